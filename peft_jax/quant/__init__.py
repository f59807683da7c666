"""Quantised weights: a leaf that holds codes instead of numbers, its codecs, and the products that know it."""

from peft_jax.quant.codecs import quantize_array
from peft_jax.quant.decode import dequantize, plain
from peft_jax.quant.leaf import QuantizedArray
from peft_jax.quant.product import attend, dot, take

__all__ = ["QuantizedArray", "attend", "dequantize", "dot", "plain", "quantize_array", "take"]
