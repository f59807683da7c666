"""Data: examples from a source, token ids with a loss mask, batches of static shape."""

from peft_jax.data.batches import Batches, eval_batches, prompt_batches
from peft_jax.data.sources import load_examples
from peft_jax.data.tokenize import Encoded, choice_tokens, encode, encode_all, encode_prompts

__all__ = ["Batches", "Encoded", "choice_tokens", "encode", "encode_all", "encode_prompts", "eval_batches",
           "load_examples", "prompt_batches"]
