"""Products with a quantised weight in one Pallas kernel: its tiles are decoded in registers, beside the matrix unit.

The plain product writes the decoded weight to memory and reads it again; this one reads the codes alone. The kernel has
one body. Triton (GPU) and Mosaic (TPU) get other tiles of it: a GPU program goes over all of a contraction itself, as
programs of one grid run at the same time; on a TPU the grid's last axis does, and a tile's sum stays in its memory.

A byte holds two neighbours of a row, so their values are never put side by side: x is split into its even and odd
columns, and either half meets its own nibbles. Codes become values by selects on their bits (by the code itself for
integers), as Mosaic has no gather and Triton none in registers. Scales that are quantised themselves are decoded before
the kernel: their 256 values would be 255 selects, and there is one of them for 32 values or more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton

from peft_jax.quant import codebooks
from peft_jax.quant.decode import float_scales
from peft_jax.quant.qarray import QuantizedArray

BLOCKS = (32, 64, 128)
DTYPES = ("bfloat16", "float32")
TPU_ROWS, TPU_TOKENS, TPU_WHOLE = 256, 512, 1024  # the last: an axis up to this may be one tile if nothing divides it


class Tiles(NamedTuple):
    """Sizes of a tile, columns counted in stored ones (bytes); ``loops``: a program goes over the whole contraction."""

    tokens: int
    rows: int
    columns: int
    loops: bool


def unfit(leaf: QuantizedArray, dtype: Any) -> str | None:
    """Why no kernel multiplies activations of a dtype with a leaf, in words; ``None`` where one does.

    Where there is a reason the plain product is used. A platform may still lack tiles for the sizes: see
    :func:`gpu_tiles` and :func:`tpu_tiles`.

    >>> from peft_jax import quantize_array
    >>> unfit(quantize_array(jnp.ones((64, 32)), block_size=16), jnp.float32)
    'its blocks are of 16 values, not of 32, 64, 128'
    """
    if len(leaf.stack):
        return "it is a stack of weights"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"activations are {jnp.dtype(dtype).name}, not {' or '.join(DTYPES)}"
    if leaf.block_size not in BLOCKS:
        blocks = f"of {leaf.block_size} values" if leaf.block_size else "whole rows"
        return f"its blocks are {blocks}, not of {', '.join(map(str, BLOCKS))}"
    if leaf.flat or leaf.matrix[0] == 1:
        return "it is one row, or its rows are no whole number of blocks"
    return None


def gpu_tiles(leaf: QuantizedArray, tokens: int, dtype: Any) -> Tiles | None:
    """Triton's: every size a power of two, 16 at least. ``None``: the rows have no such divisor.

    Few tokens get few rows, as a program is a tile of outputs, and a GPU wants more programs than it has processors.
    The rest is what ptxas 12.9 keeps in registers: nf4, blocks of 64, on sm_80 (bfloat16) and sm_90.
    """
    few, half = tokens <= 16, jnp.dtype(dtype) == jnp.bfloat16
    rows = _power(leaf.matrix[0], 64 if half and not few else 32)
    columns = max(leaf.block_size // _parts(leaf), _power(leaf.codes.shape[-1], 64 if half and few else 32))
    tokens = min(128 if half else 32, max(16, pl.next_power_of_2(tokens)))
    return None if rows < 16 else Tiles(tokens, rows, columns, True)


def tpu_tiles(leaf: QuantizedArray, tokens: int, dtype: Any) -> Tiles | None:
    """Mosaic's: rows and columns by 128, or all of them; 8 scales a row at least, or all. ``None``: there are none."""
    del dtype
    groups = 8 * leaf.block_size // _parts(leaf)
    rows = _multiple(leaf.matrix[0], 128, TPU_ROWS)
    columns = _multiple(leaf.codes.shape[-1], max(128, groups), max(512, groups))
    if not rows or not columns:
        return None
    return Tiles(min(TPU_TOKENS, pl.cdiv(tokens, 16) * 16), rows, columns, False)


def multiply(x: jax.Array, leaf: QuantizedArray, over_columns: bool, plain: Callable) -> jax.Array:
    """:func:`times` where the kernel fits the leaf, x's dtype, and the platform that a program is lowered for; else
    ``plain(x, leaf)``. A leaf whose ``product`` is "interpreted" takes a GPU's tiles to Pallas' interpreter.
    """
    if not len(x) or unfit(leaf, x.dtype):
        return plain(x, leaf)
    choices = [tiles_of(leaf, len(x), x.dtype) for tiles_of in (gpu_tiles, tpu_tiles)]
    gpu, tpu = (plain if tiles is None else partial(times, over_columns=over_columns, tiles=tiles,
                                                    interpret=leaf.product == "interpreted") for tiles in choices)
    if leaf.product == "interpreted":
        return gpu(x, leaf)
    return jax.lax.platform_dependent(x, leaf, cuda=gpu, rocm=gpu, tpu=tpu, default=plain)


def times(x: jax.Array, leaf: QuantizedArray, over_columns: bool, tiles: Tiles, interpret: bool = False) -> jax.Array:
    """x (T, C) times the transposed matrix (R, C) that a leaf holds, or x (T, R) times the matrix: (T, R) or (T, C).

    Values are decoded in float32 and rounded to x's dtype, as by the plain product; sums are float32, and float32 is
    multiplied as such (no TF32, no passes of bfloat16). Asks that :func:`unfit` gives ``None`` and one of the
    two functions its ``tiles``. ``interpret``: in Pallas' interpreter, on any platform.
    """
    tokens, parts = len(x), _parts(leaf)
    x = jnp.pad(x, ((0, -tokens % tiles.tokens), (0, 0)))
    x = x.reshape(len(x), -1, parts).transpose(2, 0, 1) if over_columns else x[None]
    sums = _call(x, leaf, over_columns, tiles, interpret).astype(x.dtype)
    return (sums[0] if over_columns else sums.transpose(1, 2, 0).reshape(x.shape[1], -1))[:tokens]


def _call(x, leaf, over_columns, tiles, interpret):
    """(1, T, R), or (parts, T, stored columns), of x (parts, T, stored columns), or (1, T, R)."""
    shape, tile = leaf.codes.shape, (tiles.rows, tiles.columns)
    inner, outer = (1, 0) if over_columns else (0, 1)  # the axis that is summed over, and the other
    steps = shape[inner] // tile[inner]
    block = tuple(shape[axis] if tiles.loops and axis == inner else tile[axis] for axis in (0, 1))
    out = (1 if over_columns else _parts(leaf), x.shape[1], shape[outer])
    scales, scale_spec = _scales(leaf, block, over_columns, tiles)
    return pl.pallas_call(
        partial(_body, leaf.quant_type, over_columns, steps if tiles.loops else 1, tiles.loops), interpret=interpret,
        grid=(x.shape[1] // tiles.tokens, shape[outer] // tile[outer], *(() if tiles.loops else (steps,))),
        in_specs=[pl.BlockSpec((len(x), tiles.tokens, block[inner]), lambda token, outer, step=0: (0, token, step)),
                  pl.BlockSpec(block, _place(over_columns)), *[scale_spec] * len(scales)],
        out_specs=pl.BlockSpec((out[0], tiles.tokens, tile[outer]), lambda token, outer, step=0: (0, token, outer)),
        out_shape=jax.ShapeDtypeStruct(out, x.dtype if tiles.loops else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2) if tiles.loops else
        mosaic.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(x, leaf.codes, *scales)


def _place(over_columns):
    """Which tile (of rows, of columns) a program of the grid reads."""
    return lambda token, outer, step=0: (outer, step) if over_columns else (step, outer)


def _scales(leaf, block, over_columns, tiles):
    """(float32 scales and offsets (R, K), how a program reads them); on a TPU rows run along the last axis, which is
    padded to 128 there, and K values of a tile are few.
    """
    factors = [float_scales(leaf)] + ([] if leaf.offsets is None else [leaf.offsets])
    arrays = [array.astype(jnp.float32) for array in factors]
    block, place = (block[0], block[1] * _parts(leaf) // leaf.block_size), _place(over_columns)
    if tiles.loops:
        return arrays, pl.BlockSpec(block, place)
    return [array.T for array in arrays], pl.BlockSpec(block[::-1], lambda *program: place(*program)[::-1])


def _body(quant_type, over_columns, steps, loops, x_ref, codes_ref, *refs):
    """One program; its refs are x, the codes, scales, maybe offsets, and the result, each (parts or 1, ...) or a tile.

    ``steps``: how many tiles of a contraction it goes over; ``loops``: that these are all.
    """
    *scale_refs, out_ref = refs
    axis = 1 if over_columns else 0

    def add(step, sums):
        codes = _read(codes_ref, axis, step, steps)
        scales = [_spread(_read(ref, axis, step, steps), codes.shape, loops) for ref in scale_refs]
        sums = list(sums)
        for part in range(1 if quant_type == "int8" else 2):
            x = _read(x_ref, 1, step, steps, part if over_columns else 0)
            weights = _decode(quant_type, part, codes, *scales).astype(x.dtype)
            sums[0 if over_columns else part] += _dot(x, weights, axis)
        return tuple(sums)

    sums = tuple(jnp.zeros(out_ref.shape[1:], jnp.float32) for _ in range(out_ref.shape[0]))
    sums = jax.lax.fori_loop(0, steps, add, sums) if steps > 1 else add(0, sums)
    if not loops:
        @pl.when(pl.program_id(2) == 0)
        def clear():
            out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)
    for part, total in enumerate(sums):
        out_ref[part] = total.astype(out_ref.dtype) if loops else out_ref[part] + total


def _read(ref, axis, step, steps, *front):
    """Tile ``step`` of the equal ones along an axis of ``ref[front]``."""
    size = ref.shape[len(front) + axis] // steps
    tile = slice(None) if steps == 1 else pl.ds(step * size, size)
    return ref[(*front, tile, slice(None)) if axis == 0 else (*front, slice(None), tile)]


def _spread(scales, shape, by_rows):
    """A scale (rows, groups), or (groups, rows), for each stored value (rows, columns)."""
    rows, columns = shape
    if by_rows:
        groups = scales.shape[1]
        return jnp.broadcast_to(scales[:, :, None], (rows, groups, columns // groups)).reshape(shape)
    groups = scales.shape[0]
    return jnp.broadcast_to(scales[:, None, :], (groups, columns // groups, rows)).reshape(columns, rows).T


def _decode(quant_type, part, codes, scales, offsets=None):
    """float32 values (rows, columns) of a tile's high (part 0) or low (1) nibbles, or of its bytes."""
    if quant_type == "int8":
        return codes.astype(jnp.float32) * scales
    code = codes.astype(jnp.int32)
    code = code >> 4 if part == 0 else code & 15
    if quant_type in ("nf4", "fp4"):
        return _select(code, [jnp.full(code.shape, value) for value in codebooks.table(quant_type)]) * scales
    values = (code + int(codebooks.table(quant_type)[0])).astype(jnp.float32) * scales
    return values if offsets is None else values + offsets


def _select(code, table):
    """table[code], by one bit after the other from the lowest."""
    while len(table) > 1:
        odd = (code & 1) == 1
        table = [jax.lax.select(odd, after, before) for before, after in zip(table[::2], table[1::2])]
        code = code >> 1
    return table[0]


def _dot(x, weights, axis):
    """float32 x (T, n) times weights, contracted along their axis."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weights, (((1,), (axis,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


def _parts(leaf: QuantizedArray) -> int:
    """Values in a stored one."""
    return 1 if leaf.quant_type == "int8" else 2


def _power(size: int, most: int) -> int:
    """The largest power of two that divides a size, up to ``most``, itself one."""
    return min(most, size & -size)


def _multiple(size: int, unit: int, most: int) -> int:
    """The largest multiple of a unit, up to ``most``, that divides a size; else all of a small size; else 0."""
    divisors = [one for one in range(unit, most + 1, unit) if size % one == 0]
    return divisors[-1] if divisors else size * (size <= TPU_WHOLE)
