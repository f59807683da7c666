"""To codes and back. Arithmetic is float32, in the order in which bitsandbytes does it, so that the bits agree."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.errors import PeftJaxError, nearest
from peft_jax.quant import codes
from peft_jax.quant.leaf import NESTED, QuantizedArray, grid

BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def check(quant_type: str, block_size: int | None, double_quant: bool) -> None:
    """Raise ``PeftJaxError`` unless the three make a codec."""
    if quant_type not in codes.TYPES:
        raise PeftJaxError(f"quant_type={quant_type!r}: {nearest(str(quant_type), codes.TYPES)}")
    if block_size is not None and (isinstance(block_size, bool) or block_size not in BLOCKS):
        raise PeftJaxError(f"block_size={block_size!r}: give one of {', '.join(map(str, BLOCKS))}, or None for one "
                           "scale an output channel.")
    if not isinstance(double_quant, bool):
        raise PeftJaxError(f"double_quant={double_quant!r}: give True or False.")
    if double_quant and quant_type not in codes.ABSMAX:
        raise PeftJaxError(f"double_quant=True with quant_type={quant_type!r}: only scales without offsets are "
                           f"quantised again: take one of {', '.join(codes.ABSMAX)}.")


def quantize_array(array: Any, quant_type: str = "nf4", *, block_size: int | None = 64, double_quant: bool = False,
                   inputs: Sequence[int] | None = None, outputs: Sequence[int] | None = None,
                   by_rows: bool = False) -> QuantizedArray:
    """A weight (*stack, *inputs, *outputs) of any floating dtype as a quantised leaf.

    Args:
      quant_type: "nf4" (arXiv 2305.14314), "fp4" (bitsandbytes'), "int4" (symmetric, -7..7 by the largest magnitude: a
        value of either sign is then exact, -8 stands only in files of others), "int4_affine" (scale and offset), "int8"
        (symmetric, -127..127).
      block_size: how many values along the inputs share a scale; ``None``: all of an output.
      double_quant: the scales, less their mean, as 8-bit codes in blocks of 256 (the paper's section 3).
      inputs, outputs: sizes of its axes; by default the last two axes are one each.
      by_rows: an embedding: values that share a scale run along the outputs, as in torch's (ids, width).

    ``nf4`` and ``fp4`` give the bytes and scales of ``bitsandbytes`` for ``array.T``. Works on shapes under
    ``jax.eval_shape``, and under ``jit``.

    >>> leaf = quantize_array(jnp.linspace(-1, 1, 128).reshape(64, 2))
    >>> leaf.shape, leaf.codes.shape, leaf.scales.shape, float(abs(dequantize(leaf)[0, 0]))
    ((64, 2), (2, 32), (2, 1), 1.0)

    Raises ``PeftJaxError`` for an unknown type or block size, an array that is no floating one, has infinite values or
    NaN, or does not end in the axes.
    """
    check(quant_type, block_size, double_quant)
    inputs, outputs = _axes(array, inputs, outputs)
    stack = array.shape[:array.ndim - len(inputs) - len(outputs)]
    _check_values(array)
    layout = grid(inputs, outputs, block_size or 0, by_rows)
    matrix = jnp.asarray(array).astype(jnp.float32).reshape(*stack, int(np.prod(inputs)), int(np.prod(outputs)))
    matrix = matrix if by_rows else jnp.swapaxes(matrix, -1, -2)
    blocks = _in_blocks(matrix.reshape(*stack, layout.rows, layout.columns), layout)
    rest = layout.columns % layout.block != 0
    found, scales, offsets = _affine(blocks) if quant_type == "int4_affine" else _symmetric(blocks, quant_type, rest)
    found = found.reshape(*stack, layout.rows, -1)[..., :layout.columns]
    nested, mean = None, None
    if double_quant:
        scales, nested, mean = _nest(scales, stack)
    packed = found.astype(jnp.int8) if quant_type == "int8" else _pack(found, quant_type)
    return QuantizedArray(packed, scales, offsets, nested, mean, quant_type, block_size or 0, inputs, outputs, by_rows,
                          jnp.dtype(array.dtype).name)


def _axes(array, inputs, outputs) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(getattr(array, "shape", ()))
    if not jnp.issubdtype(getattr(array, "dtype", np.dtype(object)), jnp.floating):
        raise PeftJaxError(f"only arrays of floating-point numbers can be quantised, this is {type(array).__name__} "
                           f"{getattr(array, 'dtype', '')}: dequantize() it first if it is quantised.")
    inputs, outputs = tuple(inputs or shape[-2:-1]), tuple(outputs or shape[-1:])
    last = (*inputs, *outputs)
    if len(shape) < 2 or shape[len(shape) - len(last):] != last or 0 in shape:
        raise PeftJaxError(f"an array {shape} does not end in inputs {inputs} and outputs {outputs}: kernels have two "
                           "axes or more.")
    return inputs, outputs


def _check_values(array) -> None:
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    if not bool(jnp.isfinite(array).all()):
        raise PeftJaxError(f"an array {tuple(array.shape)} has infinite values or NaN, which no code stands for: look "
                           "where the weights come from.")


def _in_blocks(matrix, layout):
    """(*stack, R, C) as (*stack, R, K, block), a short last block filled with zeros."""
    short = layout.blocks * layout.block - layout.columns
    if short:
        matrix = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 1) + [(0, short)])
    return matrix.reshape(*matrix.shape[:-1], layout.blocks, layout.block)


def _symmetric(blocks, quant_type, rest):
    """(codes, scales, None) of blocks (..., K, block); ``rest``: the last one is short, which bitsandbytes divides."""
    absmax = jnp.abs(blocks).max(-1)
    if quant_type in ("int4", "int8"):
        scales = absmax / np.float32(codes.ABSMAX[quant_type])
        return jnp.round(blocks * _inverse(scales)) + (8 if quant_type == "int4" else 0), scales, None
    scaled = blocks * _inverse(absmax)
    if rest:
        scaled = scaled.at[..., -1, :].set(blocks[..., -1, :] / jnp.where(absmax[..., -1:] > 0, absmax[..., -1:], 1))
    scaled, table = jnp.clip(scaled, -1, 1), codes.TABLES[quant_type]
    order = np.argsort(table, kind="stable")
    bounds = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    place = sum((scaled > bound).astype(jnp.uint8) for bound in bounds)
    return jnp.asarray(order.astype(np.uint8))[place], absmax, None


def _affine(blocks):
    """(codes, scales, offsets): from the least value of a block to the largest in 15 steps."""
    low, high = blocks.min(-1), blocks.max(-1)
    scales = (high - low) / np.float32(15)
    return jnp.clip(jnp.round((blocks - low[..., None]) * _inverse(scales)), 0, 15), scales, low


def _inverse(scales):
    """1 / scales (..., 1), zero for a block of zeros."""
    return jnp.where(scales > 0, 1 / scales, 0)[..., None]


def _pack(values, quant_type):
    """uint8 (..., ceil(C / 2)) of codes (..., C), the first of a pair in the high nibble; an odd row ends in a zero."""
    values = values.astype(jnp.uint8)
    if values.shape[-1] % 2:
        zero = int(np.flatnonzero(codes.TABLES[quant_type] == 0)[0])
        values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)], constant_values=zero)
    return (values[..., ::2] << 4) | values[..., 1::2]


def _nest(scales, stack):
    """(8-bit codes, scales of the scales, mean) of scales (*stack, R, K), each entry of the stack by itself."""
    flat = scales.reshape(*stack, -1)
    mean = _mean(flat)
    short = -flat.shape[-1] % NESTED
    rest = jnp.pad(flat - mean[..., None], [(0, 0)] * len(stack) + [(0, short)]).reshape(*stack, -1, NESTED)
    nested = jnp.abs(rest).max(-1)
    scaled = rest * _inverse(nested)
    table = codes.dynamic()
    found = jnp.searchsorted((table[1:] + table[:-1]) / np.float32(2), scaled).astype(jnp.uint8)
    return found.reshape(*stack, -1)[..., :flat.shape[-1]].reshape(scales.shape), nested, mean


@jax.jit
def _mean(flat):
    """The mean over the last axis; unlike those of XLA's sums and quotients its bits do not hang on the axes in front.

    So layers quantised one by one, as they are read, are those of a stack.
    """
    size = flat.shape[-1]
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, (1 << (size - 1).bit_length()) - size)])
    while flat.shape[-1] > 1:
        half = flat.shape[-1] // 2
        flat = flat[..., :half] + flat[..., half:]
    return flat[..., 0] * np.float32(1 / size)


def scales_of(leaf: QuantizedArray) -> jax.Array:
    """The scales (*stack, R, K) in float32."""
    if not leaf.double_quant:
        return leaf.scales.astype(jnp.float32)
    flat = leaf.scales.reshape(*leaf.stack, -1)
    by = jnp.repeat(leaf.nested, NESTED, axis=-1)[..., :flat.shape[-1]]
    return (jnp.asarray(codes.dynamic())[flat] * by + leaf.mean[..., None]).reshape(leaf.scales.shape)


def decode(leaf: QuantizedArray, found: jax.Array, scales: jax.Array, offsets: jax.Array | None) -> jax.Array:
    """float32 (..., C) of the codes of rows and their scales (..., K)."""
    layout = leaf.grid
    if leaf.quant_type == "int8":
        values = found.astype(jnp.float32)
    else:  # one gather gives both values of a byte, the fastest way on a CPU (DESIGN.md)
        values = jnp.asarray(codes.pairs(leaf.quant_type))[found].reshape(*found.shape[:-1], -1)
    if layout.blocks * layout.block != values.shape[-1]:
        values = _in_blocks(values[..., :layout.columns], layout)
    values = values.reshape(*scales.shape, layout.block) * scales[..., None]
    values = values if offsets is None else values + offsets.astype(jnp.float32)[..., None]
    return values.reshape(*scales.shape[:-1], -1)[..., :layout.columns]


def matrix(leaf: QuantizedArray) -> jax.Array:
    """float32 (*stack, outputs, inputs) as torch holds it; of an embedding (*stack, ids, width)."""
    values = decode(leaf, leaf.codes, scales_of(leaf), leaf.offsets)
    sizes = int(np.prod(leaf.inputs)), int(np.prod(leaf.outputs))
    return values.reshape(*leaf.stack, *(sizes if leaf.by_rows else sizes[::-1]))


def dequantize(leaf: QuantizedArray, dtype: Any = None) -> jax.Array:
    """The plain array (*stack, *inputs, *outputs) that a leaf stands for, in ``dtype`` or that of the array it was.

    The bits are bitsandbytes'. Raises ``PeftJaxError`` for what is no quantised leaf.

    >>> dequantize(quantize_array(jnp.ones((64, 2), jnp.bfloat16))).dtype.name
    'bfloat16'
    """
    if not isinstance(leaf, QuantizedArray):
        raise PeftJaxError(f"dequantize() was given a {type(leaf).__name__}: give a leaf that quantize made.")
    values = matrix(leaf)
    values = values if leaf.by_rows else jnp.swapaxes(values, -1, -2)
    return values.reshape(leaf.shape).astype(dtype or leaf.dtype)


def plain(leaf: Any, dtype: Any = None) -> Any:
    """The array that a leaf is, or stands for where it is quantised; in its own dtype, or in ``dtype``."""
    if isinstance(leaf, QuantizedArray):
        return dequantize(leaf, dtype)
    return leaf if dtype is None else leaf.astype(dtype)
