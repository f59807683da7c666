"""Hugging Face in and out: downloads, configs, weights, tokenizers, adapters; without torch and transformers."""
