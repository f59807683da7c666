"""From numbers to codes: NF4, bitsandbytes' FP4, int4 and int8, in float32 and with bitsandbytes' roundings.

QLoRA, arXiv:2305.14314, equations 1 to 6. What each code stands for is in ``codes.py``.
"""

from functools import partial
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from peft_jax.core import validation
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.quant.codebooks import LARGEST, QUANT_TYPES, dynamic, midpoints, steps
from peft_jax.quant.decode import GROUP, rounded
from peft_jax.quant.qarray import QuantizedArray, is_flat, matrix

BLOCK_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Below it a block counts as zeros: 127 / absmax would overflow.
TINY = 1e-36
HUGE = 1e37


def quantize_array(array, quant_type: str = "nf4", *, block_size: int | None = 64, double_quant: bool = False,
                   stack=None, inputs=None, outputs=None, by_rows: bool = False) -> QuantizedArray:
    """Quantise an array (*stack, *inputs, *outputs) of floats; works under ``jit`` and ``eval_shape``.

    Without ``stack``, ``inputs`` and ``outputs`` (sizes, as ``KernelAxes`` has them) two axes are (in, out) and three
    (stack, in, out). ``by_rows`` is for embeddings: (vocab, hidden), blocks along hidden.

    quant_type:
      "nf4", "fp4"   the nearest of sixteen values times the block's largest magnitude, as in bitsandbytes: codes,
                     scales and what they decode to equal its CPU's bit by bit, without double_quant; with it some
                     scales differ: those midway between two codes, and all in the last bits of their mean.
      "int4"         w = scale * code, codes from -7 to 7: the scale is absmax / 7. -8 is left out, so that quantising
                     -w gives minus the codes of w and no bias; leaves read from GGUF's Q4_0 use it.
      "int4_affine"  w = offset + scale * code, codes from 0 to 15: offset is the smallest of the block and scale a
                     15th of its range.
      "int8"         w = scale * code, codes from -127 to 127: the scale is absmax / 127.
    block_size: 16, 32, ..., 4096 values along the inputs; ``None`` is per channel, one block an output.
    double_quant: keep the scales in 8 bits, in groups of 256 (not the offsets of "int4_affine", which stay float32).

    Raises ``PeftJaxError`` for an unknown type or block size, arrays that are not floats, sizes that do not fit, and,
    where the values are known, NaN or infinite ones.

    >>> leaf = quantize_array(jnp.ones((128, 64)), double_quant=True)
    >>> leaf, leaf.codes.shape, leaf.scales.shape
    (QuantizedArray(nf4, 128x64 float32, block 64, double_quant), (64, 64), (64, 2))
    """
    check(quant_type, block_size, double_quant)
    _check(array)
    stack, inputs, outputs = _sizes(array, stack, inputs, outputs)
    block_size = int(block_size or 0)
    children = _encode(array, quant_type, block_size, bool(double_quant), stack, inputs, outputs, bool(by_rows))
    finite = children.pop("finite")
    if not isinstance(finite, Tracer) and not finite:
        _raise_not_finite(array)
    return QuantizedArray(**children, quant_type=quant_type, block_size=block_size, inputs=inputs, outputs=outputs,
                          by_rows=bool(by_rows), plain_dtype=str(_float_dtype(array)))


@partial(jax.jit, static_argnums=range(1, 8))
def _encode(array, quant_type, block_size, double_quant, stack, inputs, outputs, by_rows) -> dict:
    """The leaf's children, and whether all is finite (of the values too: XLA's maximum passes over NaN)."""
    rows, columns = matrix(inputs, outputs, by_rows)
    values = jnp.asarray(array, jnp.float32).reshape(*stack, *((rows, columns) if by_rows else (columns, rows)))
    finite = jnp.isfinite(values).all()
    values = values if by_rows else jnp.swapaxes(values, -1, -2)
    block = block_size or columns
    if is_flat(quant_type, columns, block):
        values = values.reshape(*stack, 1, rows * columns)
    codes, scales, offsets = (_affine if quant_type == "int4_affine" else _symmetric)(values, quant_type, block)
    children = {"codes": _pack(codes, values.shape[-1], quant_type), "scales": scales, "offsets": offsets}
    if quant_type == "int4_affine":
        finite &= jnp.isfinite(15 * scales).all()
    if double_quant:
        children |= _quantize_scales(scales)
        finite &= jnp.isfinite(children["nested"]).all()
    return children | {"finite": finite}


def _blocks(values, block: int, mode: str):
    """(..., blocks, block), the last one padded."""
    padding = -values.shape[-1] % block
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)], mode=mode) if padding else values
    return values.reshape(*values.shape[:-1], -1, block)


def _symmetric(values, quant_type: str, block: int):
    """Codes (..., blocks, block), scales (..., blocks), and no offsets."""
    blocks = _blocks(values, block, "constant")
    absmax = jnp.abs(blocks).max(-1)
    if quant_type in LARGEST:
        most = LARGEST[quant_type]
        rounded = jnp.round(blocks * jnp.where(absmax > TINY, most / absmax, 0)[..., None])
        codes = jnp.clip(rounded, -most, most).astype(jnp.int8)
        return codes if quant_type == "int8" else (codes + 8).astype(jnp.uint8), absmax * (1 / most), None
    # Exact; without it the inverse of a huge number is subnormal, which XLA flushes to 0.
    less = jnp.where(absmax > HUGE, 2.0**-10, 1)
    scaled = (blocks * less[..., None]) * jnp.where(absmax > 0, 1 / (absmax * less), 0)[..., None]
    if values.shape[-1] % block:
        scaled, absmax = _as_a_remainder(blocks, scaled, absmax)
    bounds, order = steps(quant_type)
    place = sum((scaled > bound).astype(jnp.uint8) for bound in bounds)
    return place if (order == np.arange(16)).all() else jnp.asarray(order)[place], absmax, None


def _as_a_remainder(blocks, scaled, absmax):
    """bitsandbytes' last block, where it is not whole: divided, not multiplied by the inverse; a scale of 0 is 1e-38.

    The barrier keeps XLA from making a product with the inverse of it; 1e-38 is chosen as bits, since as a float it is
    subnormal and XLA flushes it to 0.
    """
    last = absmax[..., -1:]
    divisor = jnp.where(last > 0, last, 1)[..., None]
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(divisor, blocks[..., -1:, :].shape))
    scaled = scaled.at[..., -1:, :].set(blocks[..., -1:, :] / divisor)
    bits = jnp.where(last > 0, jax.lax.bitcast_convert_type(last, jnp.int32), np.float32(1e-38).view(np.int32))
    return scaled, absmax.at[..., -1:].set(jax.lax.bitcast_convert_type(bits, jnp.float32))


def _affine(values, quant_type: str, block: int):
    """Codes (..., blocks, block), scales and offsets (..., blocks)."""
    blocks = _blocks(values, block, "edge")
    low, high = blocks.min(-1), blocks.max(-1)
    scales = high / 15 - low / 15  # a range may overflow, its fifteenth does not
    inverse = jnp.where(scales > TINY, 1 / scales, 0)
    codes = jnp.round((blocks - low[..., None]) * inverse[..., None])
    return jnp.clip(codes, 0, 15).astype(jnp.uint8), scales, low


def _pack(codes, count: int, quant_type: str):
    """Codes (..., blocks, block) as the leaf holds them: of ``count``, and an odd one's neighbour."""
    codes = codes.reshape(*codes.shape[:-2], -1)
    if quant_type == "int8":
        return codes[..., :count]
    if count % 2 and codes.shape[-1] == count:
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    codes = codes[..., :count + count % 2]
    return codes[..., ::2] << 4 | codes[..., 1::2]


def _quantize_scales(scales) -> dict:
    """Double quantisation: the mean taken off, then 8-bit dynamic codes in groups of 256, in the order of the blocks.

    A group of zeros gets code 0, as in bitsandbytes.
    """
    front, shape = scales.shape[:-2], scales.shape
    flat = scales.reshape(*front, -1)
    mean = _mean(flat)
    groups = _blocks(flat - mean[..., None], GROUP, "constant")
    nested = jnp.abs(groups).max(-1)
    scaled = groups * jnp.where(nested > 0, 1 / nested, 0)[..., None]
    codes = jnp.searchsorted(midpoints(dynamic()), scaled.reshape(-1)).astype(jnp.uint8).reshape(scaled.shape)
    codes = jnp.where(nested[..., None] > 0, codes, 0).reshape(*front, -1)[..., :flat.shape[-1]]
    return {"scales": codes.reshape(shape), "nested": nested, "mean": mean}


def _mean(flat):
    """The mean over the last axis; unlike those of XLA's sums and quotients its bits do not hang on the axes in front.

    So layers quantised one by one, as they are read, are those of a stack.
    """
    size = flat.shape[-1]
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, (1 << (size - 1).bit_length()) - size)])
    while flat.shape[-1] > 1:
        half = flat.shape[-1] // 2
        flat = flat[..., :half] + flat[..., half:]
    return rounded(flat[..., 0] * np.float32(1 / size))


def _float_dtype(array):
    return jax.dtypes.canonicalize_dtype(array.dtype)


def check(quant_type: str, block_size: int | None, double_quant: bool) -> None:
    """Raise ``PeftJaxError`` for what is no codec; see :func:`quantize_array`."""
    if not isinstance(quant_type, str) or quant_type not in QUANT_TYPES:
        words = repr(quant_type).partition("\n")[0]  # an array that was given in its place has many lines
        raise PeftJaxError(f"quant_type={words} is no data type: {nearest(words.strip(chr(39)), QUANT_TYPES)}")
    whole = isinstance(block_size, Integral) and not isinstance(block_size, bool)
    if block_size is not None and not (whole and block_size in BLOCK_SIZES):
        raise PeftJaxError(f"block_size={block_size!r} is none of {', '.join(map(str, BLOCK_SIZES))}, or None, which "
                           "is per channel.")
    validation.check_choice("double_quant", double_quant, (True, False))


def _check(array) -> None:
    if isinstance(array, QuantizedArray):
        raise PeftJaxError(f"{array} is quantised already: dequantize it first.")
    if not (hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating)):
        raise PeftJaxError(f"only arrays of floats are quantised, and this is {getattr(array, 'dtype', type(array))}.")
    if not array.size:
        raise PeftJaxError(f"an array of shape {array.shape} has nothing to quantise.")


def _sizes(array, stack, inputs, outputs) -> Any:
    """The plain rule where nothing is given; otherwise what is given, checked."""
    shape = tuple(array.shape)
    if stack is inputs is outputs is None and len(shape) in (2, 3):
        return shape[:-2], shape[-2:-1], shape[-1:]
    if inputs is None or outputs is None:
        raise PeftJaxError(f"the axes of an array of shape {shape} are not known: give the sizes of its inputs and "
                           "outputs (peft_jax.kernel_axes finds them).")
    sizes = tuple(axes if isinstance(axes, Integral) else tuple(axes) for axes in (stack or (), inputs, outputs))
    if any(isinstance(axes, Integral) for axes in sizes) or sum(sizes, ()) != shape:
        raise PeftJaxError(f"stack={sizes[0]}, inputs={sizes[1]}, outputs={sizes[2]} together are not the shape "
                           f"{shape}: give the sizes of all axes, in order, such as inputs=(64,).")
    return sizes


def _raise_not_finite(array) -> None:
    bad = np.argwhere(~np.isfinite(np.asarray(array, np.float32)))
    if not len(bad):
        most = float(np.abs(np.asarray(array, np.float32)).max())
        raise PeftJaxError(f"the weights reach {most:.1e}, which scales in float32 cannot take: check them, or "
                           "quantise without double_quant and int4_affine.")
    raise PeftJaxError(f"the weights have {len(bad)} NaN or infinite values, the first at {tuple(bad[0].tolist())}: "
                       "quantised they would spoil their blocks; load or train them anew.")
