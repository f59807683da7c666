"""What a tile's bytes stand for, computed where the tile is: beside the matrix unit, in a kernel's registers.

A byte holds two neighbours of a row. Codes become values by selects on their bits, or by arithmetic for integers, as
neither Mosaic has a gather; by masks, as not every version of it has shifts.
"""

import jax
import jax.numpy as jnp

from peft_jax.quant import codebooks
from peft_jax.quant.decode import float_scales
from peft_jax.quant.qarray import QuantizedArray


def parts(leaf: QuantizedArray) -> int:
    """Values in a stored one: 1 of "int8", 2 of the types of four bits."""
    return 1 if leaf.quant_type == "int8" else 2


def factors(leaf: QuantizedArray) -> list[jax.Array]:
    """Scales, and offsets where there are some: float32 (blocks, rows), so that rows run along the last axis.

    Scales that are quantised themselves are decoded here, before a kernel: their 256 values would be 255 selects, and
    there is one of them for 32 values or more.
    """
    arrays = [float_scales(leaf)] + ([] if leaf.offsets is None else [leaf.offsets])
    return [array.astype(jnp.float32).T for array in arrays]


def values(quant_type: str, part: int, codes: jax.Array, scales: jax.Array, offsets: jax.Array | None = None):
    """float32 values of a tile's high (part 0) or low (1) nibbles, or of its bytes.

    codes, scales, offsets: (rows, columns), the last two one for each stored value.
    """
    if quant_type == "int8":
        return codes.astype(jnp.float32) * scales
    lowest = 4 if part == 0 else 0
    code, table = codes.astype(jnp.int32), codebooks.table(quant_type)
    if quant_type in ("nf4", "fp4"):
        return _select(code, lowest, [jnp.full(code.shape, value) for value in table]) * scales
    nibble = (code & (15 << lowest)).astype(jnp.float32) * 0.5**lowest
    found = (nibble + float(table[0])) * scales
    return found if offsets is None else found + offsets


def _select(code: jax.Array, lowest: int, table: list[jax.Array]) -> jax.Array:
    """The entry of a table of sixteen that four bits name, the ``lowest`` of them first."""
    for bit in range(lowest, lowest + 4):
        odd = (code & (1 << bit)) != 0
        table = [jax.lax.select(odd, after, before) for before, after in zip(table[::2], table[1::2], strict=True)]
    return table[0]
