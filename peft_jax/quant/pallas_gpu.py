"""The fused product on Hopper GPUs (H100, H200): a Pallas kernel for Mosaic, whose tensor cores read shared memory.

A program has one tile of outputs. In each step a tile of codes arrives, is decoded in registers, written to shared
memory in bfloat16, and multiplied from there by WGMMA, as W x^T: 64 rows of a weight go with as few as 8 tokens. A
weight is decoded once for each tile of tokens, so the kernel is for few of them.

A tile's high nibbles lie beside its low ones, [v0 v2 v4 ... | v1 v3 v5 ...], as putting each value beside its neighbour
would cost an exchange between threads; x is put in that order before, or the result back from it after.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from peft_jax.core._compat import gpu_kernel
from peft_jax.quant.pallas_tile import factors, parts, values
from peft_jax.quant.qarray import QuantizedArray

ROWS = 64  # of a weight in a tile: what one WGMMA takes
COLUMNS = (64, 32)  # stored ones in a tile, the first that divides: 128 or 64 bytes in bfloat16, as memory is swizzled
TOKENS = 128  # in a tile, at most: the sums of 128 x 128 outputs are half of a thread's registers
STAGES = 4  # tiles on their way or in use; half as many of over 64 tokens, so that two programs share a processor
PROGRAMS, STEPS = 264, 4  # a contraction is split while there are fewer programs, two a processor, and steps are left
CAPABILITY = "9.0"  # the one with WGMMA: later cards have another instruction in its place


class Tiles(NamedTuple):
    """Sizes of a tile, columns counted in stored ones (bytes); ``splits``: programs that share a contraction."""

    tokens: int
    columns: int
    splits: int


def unfit(leaf: QuantizedArray, dtype: Any, capability: str | None = None) -> str | None:
    """Why this kernel does not multiply activations of a dtype with a leaf that ``pallas.unfit`` lets pass, in words.

    ``None`` where it does. ``capability``: the card's, by default of the one that is here; where there is none, a
    program is taken to be for a Hopper.
    """
    capability = capability or _capability()
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"activations are {jnp.dtype(dtype).name}, and a GPU's kernel is for bfloat16"
    if not _columns(leaf) or leaf.matrix[0] % ROWS:
        return f"its {leaf.matrix[0]} x {leaf.matrix[1]} values are no whole number of a GPU's tiles, {ROWS} x 64"
    if capability != CAPABILITY:
        return f"the GPU's kernel is for compute capability {CAPABILITY}, and here it is {capability}"
    return None


def _capability() -> str:
    """Of the card that jax computes on; of AMD's it is a name."""
    card: Any = jax.devices()[0]
    return card.compute_capability if card.platform == "gpu" else CAPABILITY


def _columns(leaf: QuantizedArray) -> int:
    """Stored columns of a tile, which is 64 values wide at least; 0 if none divides."""
    return next((one for one in COLUMNS if not leaf.codes.shape[-1] % one and one * parts(leaf) >= ROWS), 0)


def tiles_of(leaf: QuantizedArray, tokens: int, over_columns: bool) -> Tiles:
    """Tiles for a leaf that is not :func:`unfit`."""
    tile = min(TOKENS, pl.cdiv(tokens, 8) * 8)
    across, along = leaf.matrix[0] // ROWS, leaf.codes.shape[-1] // _columns(leaf)
    programs, steps = (across, along) if over_columns else (along, across)
    programs, splits = programs * pl.cdiv(tokens, tile), 1
    while programs * splits < PROGRAMS and steps % (2 * splits) == 0 and steps // (2 * splits) >= STEPS:
        splits *= 2
    return Tiles(tile, _columns(leaf), splits)


def times(x: jax.Array, leaf: QuantizedArray, over_columns: bool, tiles: Tiles | None = None,
          interpret: Any = None) -> jax.Array:
    """bfloat16 x (T, C) times the transposed matrix (R, C) that a leaf holds, or x (T, R) times it: (T, R) or (T, C).

    Values are decoded in float32 and rounded to bfloat16, as by the plain product; sums are float32. Asks that
    :func:`unfit` gives ``None``. ``interpret``: parameters of jax's interpreter of GPU kernels, to run it on a CPU.
    """
    tokens, tiles = len(x), tiles or tiles_of(leaf, len(x), over_columns)
    x = jnp.pad(x, ((0, -tokens % tiles.tokens), (0, 0)))
    if over_columns:
        x = x.reshape(len(x), -1, tiles.columns, parts(leaf)).swapaxes(2, 3).reshape(x.shape)
    y = _call(x, leaf, over_columns, tiles, interpret).sum(0).T.astype(x.dtype)
    if not over_columns:
        y = y.reshape(len(x), -1, parts(leaf), tiles.columns).swapaxes(2, 3).reshape(y.shape)
    return y[:tokens]


def _call(x, leaf, over_columns, tiles, interpret):
    """float32 (splits, R or C, T) of x (T, C or R): each split's sums."""
    size, width = leaf.matrix[0 if over_columns else 1], tiles.columns * parts(leaf)
    outer, inner = (ROWS, width) if over_columns else (width, ROWS)
    steps = x.shape[1] // inner // tiles.splits
    return gpu_kernel(
        partial(_body, leaf.quant_type, leaf.block_size, over_columns, tiles, steps, (outer, inner)),
        jax.ShapeDtypeStruct((tiles.splits, size, len(x)), jnp.float32), kernel_name="quantised_product",
        grid=(size // outer, len(x) // tiles.tokens, tiles.splits), grid_names=("outer", "token", "split"),
        compiler_params=mosaic.CompilerParams(lowering_semantics=mosaic.LoweringSemantics.Warpgroup),
        **({} if interpret is None else {"interpret": interpret}),
    )(x, leaf.codes, *factors(leaf))


def _body(quant_type, block_size, over_columns, tiles, steps, sizes, x_ref, codes_ref, *refs):
    """One program: ``steps`` tiles of a contraction. ``sizes``: of its tile of outputs, and of a step's inputs.

    The last ref is the result's; those before are of :func:`factors`.
    """
    *factor_refs, out_ref = refs
    outer, inner = sizes
    at, token, split = (jax.lax.axis_index(name) for name in ("outer", "token", "split"))
    specs = _specs(block_size, over_columns, tiles, sizes, (at, token), split * steps)
    stages = min(steps, STAGES if tiles.tokens <= 64 else STAGES // 2)

    def run(weights_ref, sums_ref):
        step = partial(_step, quant_type, over_columns, weights_ref, sums_ref)
        in_specs = [*specs, *specs[2:] * (len(factor_refs) - 1)]
        pipeline = mosaic.emit_pipeline(step, grid=(steps,), in_specs=in_specs, max_concurrent_steps=stages)
        pipeline(x_ref, codes_ref, *factor_refs)
        return sums_ref[...]

    def program(weights_ref):
        sums = pl.run_scoped(partial(run, weights_ref), mosaic.WGMMAAccumulatorRef((outer, tiles.tokens), jnp.float32))
        out_ref[split, pl.ds(at * outer, outer), pl.ds(token * tiles.tokens, tiles.tokens)] = sums

    pl.run_scoped(program, mosaic.SMEM((ROWS, outer * inner // ROWS), x_ref.dtype))


def _specs(block_size, over_columns, tiles, sizes, place, first):
    """What a step reads, of x, of the codes, of factors; ``place``: the program's tile of outputs, and of tokens.

    ``first``: its first step among all of the contraction.
    """
    outer, inner = sizes
    at, token = place
    width = outer * inner // ROWS  # a tile's values, one of its rows
    groups = max(1, width // block_size)  # factors of a row in a tile; several tiles may share one

    def tile_of(step):
        return (at, first + step) if over_columns else (first + step, at)

    def factors_of(step):
        row, column = tile_of(step)
        return column * width // (groups * block_size), row

    return (mosaic.BlockSpec((tiles.tokens, inner), lambda step: (token, first + step)),
            mosaic.BlockSpec((ROWS, tiles.columns), tile_of), mosaic.BlockSpec((groups, ROWS), factors_of))


def _step(quant_type, over_columns, weights_ref, sums_ref, _, x_ref, codes_ref, *factor_refs):
    """Decode a tile into shared memory, and add its product with x (tokens, inner) to the sums (outer, tokens)."""
    codes, columns = codes_ref[...], codes_ref.shape[1]
    spread = [_spread(ref, codes.shape) for ref in factor_refs]
    for part in range(weights_ref.shape[1] // columns):
        weights = values(quant_type, part, codes, *spread).astype(weights_ref.dtype)
        weights_ref[:, part * columns:(part + 1) * columns] = weights
    mosaic.commit_smem()
    weights_ref = weights_ref if over_columns else weights_ref.transpose((1, 0))
    mosaic.wgmma(sums_ref, weights_ref, x_ref.transpose((1, 0)))
    mosaic.wgmma_wait(0)
    mosaic.commit_smem()  # all warps wait: none may write the next tile while another's product still reads this one


def _spread(ref, shape):
    """A factor for each stored value (rows, columns), of factors (groups, rows)."""
    groups, columns = ref.shape[0], shape[1]
    spread, *others = [jax.lax.broadcast_in_dim(ref[group], shape, (0,)) for group in range(groups)]
    for group, other in enumerate(others, 1):  # each takes over where its columns begin
        place = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        spread = jax.lax.select(place >= group * columns // groups, other, spread)
    return spread
