"""Plain Flax Linen models. Nothing here knows of fine-tuning methods."""

from peft_jax.models.bert import Encoder, EncoderConfig
from peft_jax.models.heads import Head
from peft_jax.models.llama import CausalLM, LlamaConfig, untie

__all__ = ["CausalLM", "Encoder", "EncoderConfig", "Head", "LlamaConfig", "untie"]
