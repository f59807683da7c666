"""A quantised weight as one leaf of a parameter tree: packed codes, their scales, and what the plain array was."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax

from peft_jax.errors import PeftJaxError

# Scales are quantised again in blocks of this many, as bitsandbytes does it.
NESTED = 256
# Ways to multiply with a leaf: by decoding it first; in one kernel, where there is one; in that, interpreted.
PRODUCTS = ("plain", "fused", "interpreted")


class Grid(NamedTuple):
    """The matrix that codes are laid out by: rows of ``columns`` values in blocks of ``block``."""

    rows: int
    columns: int
    block: int

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.columns // self.block)


@partial(jax.tree_util.register_dataclass,
         data_fields=["codes", "scales", "offsets", "nested", "mean"],
         meta_fields=["quant_type", "block_size", "inputs", "outputs", "by_rows", "plain_dtype", "product"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A kernel (*stack, *inputs, *outputs), or an embedding, as codes and scales.

    Each entry of the stack is held as torch holds the weight, as a matrix of one row for each output, or, of an
    embedding (``by_rows``), of one row for each id; so the bytes of bitsandbytes and GGUF are taken as they are. Blocks
    run along a row. Where a row is no whole number of blocks, the matrix counts as one long row, as in bitsandbytes.
    R rows, C columns, K blocks a row:

      codes: uint8 (*stack, R, ceil(C / 2)), two a byte, the first in the high nibble; of "int8" int8 (*stack, R, C).
      scales: float32 or float16 (*stack, R, K), or uint8 where they are quantised again, of all R K in one row.
      offsets: as scales, added to every value; ``None`` of the symmetric types.
      nested: float32 (*stack, ceil(R K / 256)), the scales of the scales, and mean: float32 (*stack), added to all of
        them; else ``None``.
      block_size: values that share a scale; 0: a whole row.
      plain_dtype: the name of the plain array's dtype, which :func:`peft_jax.dequantize` gives back.
      product: how to multiply with it, see :func:`peft_jax.quantize`.

    ``shape``, ``size`` and ``dtype`` are the plain array's, ``nbytes`` that of all buffers. Slicing the buffers along a
    stack, as ``nn.scan`` does, gives the entry's leaf.
    """

    codes: Any
    scales: Any
    offsets: Any = None
    nested: Any = None
    mean: Any = None
    quant_type: str = "nf4"
    block_size: int = 64
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    by_rows: bool = False
    plain_dtype: str = "float32"
    product: str = "plain"

    @property
    def stack(self) -> tuple[int, ...]:
        return tuple(self.codes.shape[:-2])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stack, *self.inputs, *self.outputs)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self):
        return jax.numpy.dtype(self.plain_dtype)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in jax.tree.leaves(self))

    @property
    def grid(self) -> Grid:
        return grid(self.inputs, self.outputs, self.block_size, self.by_rows)

    @property
    def double_quant(self) -> bool:
        return self.nested is not None


def grid(inputs: tuple[int, ...], outputs: tuple[int, ...], block_size: int, by_rows: bool) -> Grid:
    """The layout of a weight of these axes, see :class:`QuantizedArray`."""
    sizes = math.prod(inputs), math.prod(outputs)
    rows, columns = sizes if by_rows else sizes[::-1]
    if not block_size:
        return Grid(rows, columns, columns)
    return Grid(1, rows * columns, block_size) if columns % block_size else Grid(rows, columns, block_size)


def is_leaf(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


def cannot_train(path: str, leaf: QuantizedArray) -> PeftJaxError:
    """What to raise where a quantised leaf is asked to train."""
    return PeftJaxError(f"'{path}' is quantised ({leaf.quant_type}) and cannot train: leave it out of what trains, or "
                        "out of the quantised modules, quantize(exclude_modules=...).")
