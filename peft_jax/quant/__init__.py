"""Quantised weights: a leaf that holds codes instead of numbers, its codecs, and the products that know it."""

from peft_jax.quant.codecs import check, quantize_array
from peft_jax.quant.decode import dequantize, plain
from peft_jax.quant.leaf import QuantizedArray, cannot_train, is_leaf
from peft_jax.quant.product import attend, dot, take
from peft_jax.quant.reading import read

__all__ = ["QuantizedArray", "attend", "cannot_train", "check", "dequantize", "dot", "is_leaf", "plain",
           "quantize_array", "read", "take"]
