"""Plain Flax Linen models. Nothing here knows of fine-tuning methods."""

from peft_jax.models.llama import CausalLM, LlamaConfig, untie

__all__ = ["CausalLM", "LlamaConfig", "untie"]
