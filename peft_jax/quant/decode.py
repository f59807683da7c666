"""From codes back to numbers, in float32 and with bitsandbytes' roundings."""

import jax
import jax.numpy as jnp

from peft_jax.errors import PeftJaxError
from peft_jax.quant.codebooks import byte_table, dynamic
from peft_jax.quant.qarray import QuantizedArray

GROUP = 256  # scales that share one nested scale
SMALLEST = float(jnp.finfo(jnp.float32).min)


def dequantize(leaf: QuantizedArray, dtype=None):
    """The array (*stack, *inputs, *outputs) that a leaf stands for, in ``dtype``, by default the one it came in.

    Computed in float32 and rounded once: equal to bitsandbytes' on the CPU to the bit. Raises ``PeftJaxError`` for
    what is not quantised.

    >>> from peft_jax import dequantize, quantize_array
    >>> kernel = jnp.array([[3.5], [-7.0], [1.2], [0.0]])
    >>> dequantize(quantize_array(kernel, "int4"))[:, 0].tolist()
    [4.0, -7.0, 1.0, 0.0]
    """
    if not isinstance(leaf, QuantizedArray):
        raise PeftJaxError(f"dequantize was given a {type(leaf).__name__}, which is not quantised: take it as it is; "
                           "of a whole tree, quantize().merge(params) makes plain what is quantised.")
    values = matrices(leaf, leaf.dtype if dtype is None else dtype)
    values = values if leaf.by_rows else jnp.swapaxes(values, -1, -2)
    return values.reshape(leaf.shape)


def layer_by_layer(leaf: QuantizedArray, dtype=None):
    """:func:`dequantize`, one entry of the stack after the other: of no more than one there are float32 numbers."""
    if leaf.stack:
        return jax.lax.map(lambda entry: layer_by_layer(entry, dtype), leaf)
    return dequantize(leaf, dtype)


def plain(kernel, dtype=None):
    """The plain array of a leaf or of an array, which is returned as it is."""
    if isinstance(kernel, QuantizedArray):
        return dequantize(kernel, dtype)
    return kernel if dtype is None else kernel.astype(dtype)


def matrices(leaf: QuantizedArray, dtype):
    """(*stack, rows, columns) in ``dtype``, as the leaf holds them."""
    count = leaf.matrix[0] * leaf.matrix[1] if leaf.flat else leaf.matrix[1]
    values = decode(leaf.codes, float_scales(leaf), leaf.offsets, leaf.quant_type, leaf.block, count)
    return values.astype(dtype).reshape(*leaf.stack, *leaf.matrix)


def decode(codes, scales, offsets, quant_type: str, block: int, count: int):
    """float32 (..., count) from codes (..., bytes), scales and offsets (..., blocks)."""
    values = unpack(codes, quant_type)[..., :count]
    padding = scales.shape[-1] * block - count
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)]) if padding else values
    values = values.reshape(*scales.shape, block) * scales.astype(jnp.float32)[..., None]
    if offsets is not None:
        values = rounded(values) + offsets.astype(jnp.float32)[..., None]
    return values.reshape(*scales.shape[:-1], -1)[..., :count]


def unpack(codes, quant_type: str):
    """float32 (..., columns): what the codes stand for, before scales.

    One gather yields both values of a byte: the fastest of the ways tried on a CPU.
    """
    if quant_type == "int8":
        return codes.astype(jnp.float32)
    pairs = jnp.asarray(byte_table(quant_type)).at[codes].get(mode="promise_in_bounds")
    return pairs.reshape(*codes.shape[:-1], -1)


def float_scales(leaf: QuantizedArray):
    """(*stack, rows, blocks): the scales as floats, decoded where they were quantised again."""
    if leaf.nested is None:
        return leaf.scales
    front = leaf.scales.shape[:-2]
    codes = leaf.scales.reshape(*front, -1)
    nested = jnp.repeat(leaf.nested, GROUP, axis=-1)[..., :codes.shape[-1]]
    return nested_values(codes, nested, leaf.mean[..., None]).reshape(leaf.scales.shape)


def nested_values(codes, nested, mean):
    """float32: scales from their codes, each with its group's nested scale, and the mean."""
    return rounded(jnp.asarray(dynamic()).at[codes].get(mode="promise_in_bounds") * nested) + mean


def rounded(product):
    """``product``, rounded before something is added: XLA would make both one fused step, with other last bits.

    Neither optimization_barrier nor reduce_precision keeps it from that (tried on a CPU); a maximum does.
    """
    return jnp.maximum(product, SMALLEST)
