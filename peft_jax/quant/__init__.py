"""Quantised weights: a leaf type of parameter trees, its codecs, and the products that read it."""

from peft_jax.quant.codecs import check, dequantize, plain, quantize_array
from peft_jax.quant.leaf import PRODUCTS, QuantizedArray, cannot_train, is_leaf
from peft_jax.quant.product import attend, dot, take
from peft_jax.quant.reading import read

__all__ = ["PRODUCTS", "QuantizedArray", "attend", "cannot_train", "check", "dequantize", "dot", "is_leaf", "plain",
           "quantize_array", "read", "take"]
