"""Adapters as Hugging Face peft stores them, read and written."""
