"""The fused product on TPUs: a Pallas kernel for Mosaic.

The grid's last axis goes over a contraction, and a tile's sum stays in its memory. Values of a byte are never put side
by side: x is split into its even and odd columns, and either half meets its own nibbles.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic

from peft_jax.quant.pallas_tile import factors, parts, values
from peft_jax.quant.qarray import QuantizedArray

ROWS, TOKENS, WHOLE = 256, 512, 1024  # the last: an axis up to this may be one tile if nothing divides it


class Tiles(NamedTuple):
    """Sizes of a tile, columns counted in stored ones (bytes)."""

    tokens: int
    rows: int
    columns: int


def tiles_of(leaf: QuantizedArray, tokens: int) -> Tiles | None:
    """Rows and columns by 128, or all of them; 8 scales a row at least, or all. ``None``: there are none such."""
    groups = 8 * leaf.block_size // parts(leaf)
    rows = _multiple(leaf.matrix[0], 128, ROWS)
    columns = _multiple(leaf.codes.shape[-1], max(128, groups), max(512, groups))
    return Tiles(min(TOKENS, pl.cdiv(tokens, 16) * 16), rows, columns) if rows and columns else None


def _multiple(size: int, unit: int, most: int) -> int:
    """The largest multiple of a unit, up to ``most``, that divides a size; else all of a small size; else 0."""
    divisors = [one for one in range(unit, most + 1, unit) if size % one == 0]
    return divisors[-1] if divisors else size * (size <= WHOLE)


def times(x: jax.Array, leaf: QuantizedArray, over_columns: bool, tiles: Tiles, interpret: bool = False) -> jax.Array:
    """x (T, C) times the transposed matrix (R, C) that a leaf holds, or x (T, R) times the matrix: (T, R) or (T, C).

    Values are decoded in float32 and rounded to x's dtype, as by the plain product; sums are float32, and float32 is
    multiplied as such (no passes of bfloat16). ``interpret``: in Pallas' interpreter, on any platform.
    """
    tokens = len(x)
    x = jnp.pad(x, ((0, -tokens % tiles.tokens), (0, 0)))
    x = x.reshape(len(x), -1, parts(leaf)).transpose(2, 0, 1) if over_columns else x[None]
    sums = _call(x, leaf, over_columns, tiles, interpret).astype(x.dtype)
    return (sums[0] if over_columns else sums.transpose(1, 2, 0).reshape(x.shape[1], -1))[:tokens]


def _call(x, leaf, over_columns, tiles, interpret):
    """(1, T, R), or (parts, T, stored columns), of x (parts, T, stored columns), or (1, T, R)."""
    shape, tile = leaf.codes.shape, (tiles.rows, tiles.columns)
    inner, outer = (1, 0) if over_columns else (0, 1)  # the axis that is summed over, and the other
    out = (1 if over_columns else parts(leaf), x.shape[1], shape[outer])
    place = _place(over_columns)
    groups = (tile[1] * parts(leaf) // leaf.block_size, tile[0])
    scales = factors(leaf)
    return pl.pallas_call(
        partial(_body, leaf.quant_type, over_columns), interpret=interpret,
        grid=(x.shape[1] // tiles.tokens, shape[outer] // tile[outer], shape[inner] // tile[inner]),
        in_specs=[pl.BlockSpec((len(x), tiles.tokens, tile[inner]), lambda token, outer, step: (0, token, step)),
                  pl.BlockSpec(tile, place),
                  *[pl.BlockSpec(groups, lambda *program: place(*program)[::-1])] * len(scales)],
        out_specs=pl.BlockSpec((out[0], tiles.tokens, tile[outer]), lambda token, outer, step: (0, token, outer)),
        out_shape=jax.ShapeDtypeStruct(out, jnp.float32),
        compiler_params=mosaic.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(x, leaf.codes, *scales)


def _place(over_columns):
    """Which tile (of rows, of columns) a program of the grid reads."""
    return lambda token, outer, step: (outer, step) if over_columns else (step, outer)


def _body(quant_type, over_columns, x_ref, codes_ref, *refs):
    """One program; its refs are x (parts or 1, ...), the codes, scales, maybe offsets, and the result, as x."""
    *scale_refs, out_ref = refs
    codes = codes_ref[...]
    scales = [_spread(ref[...], codes.shape) for ref in scale_refs]
    sums: list = [0] * out_ref.shape[0]
    for part in range(1 if quant_type == "int8" else 2):
        x = x_ref[part if over_columns else 0]
        weights = values(quant_type, part, codes, *scales).astype(x.dtype)
        sums[0 if over_columns else part] += _dot(x, weights, 1 if over_columns else 0)

    @pl.when(pl.program_id(2) == 0)
    def clear():
        out_ref[...] = jnp.zeros(out_ref.shape, out_ref.dtype)

    for part, total in enumerate(sums):
        out_ref[part] += total


def _spread(scales, shape):
    """A scale (groups, rows) for each stored value (rows, columns)."""
    rows, columns = shape
    groups = scales.shape[0]
    return jnp.broadcast_to(scales[:, None, :], (groups, columns // groups, rows)).reshape(columns, rows).T


def _dot(x, weights, axis):
    """float32 x (T, n) times weights, contracted along their axis."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, weights, (((1,), (axis,)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)
