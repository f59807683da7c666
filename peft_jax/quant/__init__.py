"""Quantised weights: a leaf that holds codes instead of numbers, its codecs, and the products that know it."""

from peft_jax.quant.codebooks import QUANT_TYPES
from peft_jax.quant.decode import dequantize, layer_by_layer, plain
from peft_jax.quant.encode import check, quantize_array
from peft_jax.quant.matmul import attend, dot, take
from peft_jax.quant.qarray import PRODUCTS, QuantizedArray, cannot_train, is_leaf

__all__ = ["PRODUCTS", "QUANT_TYPES", "QuantizedArray", "attend", "cannot_train", "check", "dequantize", "dot",
           "is_leaf", "layer_by_layer", "plain", "quantize_array", "take"]
