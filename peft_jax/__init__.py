"""Parameter-efficient fine-tuning for JAX and Flax, as pure functions over parameter trees. The table of contents."""

from peft_jax.errors import PeftJaxError
from peft_jax.generation import Sampling, generate
from peft_jax.hub import load_adapter, load_pretrained, load_tokenizer, save_adapter, save_pretrained
from peft_jax.method import Method, bind, chain, check_read
from peft_jax.methods import METHODS, lora
from peft_jax.models import untie
from peft_jax.targets import KernelAxes, kernel_axes
from peft_jax.tree import combine, count, flatten, nbytes, partition, unflatten

__all__ = [
    "METHODS",
    "KernelAxes",
    "Method",
    "PeftJaxError",
    "Sampling",
    "bind",
    "chain",
    "check_read",
    "combine",
    "count",
    "flatten",
    "generate",
    "kernel_axes",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "lora",
    "nbytes",
    "partition",
    "save_adapter",
    "save_pretrained",
    "unflatten",
    "untie",
]
