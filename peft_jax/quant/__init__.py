"""Quantised weights: a leaf type of parameter trees, its codecs, and the products that read it."""

from peft_jax.quant.codecs import check, dequantize, plain, quantize_array
from peft_jax.quant.leaf import QuantizedArray, is_leaf
from peft_jax.quant.product import attend, dot, take

__all__ = ["QuantizedArray", "attend", "check", "dequantize", "dot", "is_leaf", "plain", "quantize_array", "take"]
