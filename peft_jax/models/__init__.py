"""Plain Flax Linen models. Nothing here knows of fine-tuning methods."""

from peft_jax.models.bert import Encoder, EncoderConfig
from peft_jax.models.gpt2 import GPT2, GPT2Config
from peft_jax.models.heads import Head
from peft_jax.models.llama import CausalLM, LlamaConfig, untie

__all__ = ["GPT2", "CausalLM", "Encoder", "EncoderConfig", "GPT2Config", "Head", "LlamaConfig", "untie"]
