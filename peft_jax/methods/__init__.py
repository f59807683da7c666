"""Fine-tuning methods, one file each."""

from peft_jax.methods.lora import lora

METHODS = {"lora": lora}

__all__ = ["METHODS", "lora"]
