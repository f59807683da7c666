"""The quantised leaf: what stands in a parameter tree where a kernel or an embedding was."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import tree
from peft_jax.errors import PeftJaxError

# Ways to multiply with a leaf: by decoding it first; in one kernel, where there is one; in that, interpreted.
PRODUCTS = ("plain", "fused", "interpreted")


def _static(**options):
    return field(metadata={"static": True}, **options)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class QuantizedArray:
    """Codes and scales of an array (*stack, *inputs, *outputs); :func:`peft_jax.dequantize` gives the array back.

    Held as torch holds a linear layer, a matrix (rows, columns) = (outputs, inputs) for each entry of the stack, so
    that bitsandbytes' and GGUF's bytes are taken as they are; with ``by_rows`` (embeddings) the rows are the inputs.
    Blocks of ``block_size`` run along the columns, 0 is one block a row. Where a block would not fit (``flat``),
    they run on through the rows as in bitsandbytes: below, rows is then 1 and columns all there are.

    codes:   uint8 (*stack, rows, columns / 2), two codes a byte, the first in the high nibble; an odd one is padded.
             For "int8" int8 (*stack, rows, columns).
    scales:  float32 or float16 (*stack, rows, blocks): a block's values are its codes' (``codes.py``) times this.
             With double quantisation uint8 (*stack, rows, blocks), codes of ``codes.dynamic()``,
    nested:  float32 (*stack, ceil(rows * blocks / 256)) their scales, and
    mean:    float32 (*stack), which is added.
    offsets: float32 or float16 (*stack, rows, blocks), what code 0 of an affine type stands for.

    ``product`` is how to multiply with it, see :func:`peft_jax.quantize`. ``gathered``, on a mesh, is the sharding that
    a matrix (rows, columns) has while it is multiplied with: codes are brought together so, then decoded.

    A pytree: the arrays are its children, the rest is static, so jit, grad, scan and vmap over the stack see it as they
    see the kernel. Made by :func:`peft_jax.quantize_array`; the constructor checks nothing.
    """

    codes: Any
    scales: Any
    nested: Any = None
    mean: Any = None
    offsets: Any = None
    quant_type: str = _static(default="nf4")
    block_size: int = _static(default=64)
    inputs: tuple[int, ...] = _static(default=())
    outputs: tuple[int, ...] = _static(default=())
    by_rows: bool = _static(default=False)
    plain_dtype: str = _static(default="float32")
    product: str = _static(default="plain")
    gathered: Any = _static(default=None)  # noqa: RUF009

    @property
    def stack(self) -> tuple[int, ...]:
        """Read off the codes, so that it is right inside a scan too, which slices them."""
        return self.codes.shape[:-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain array: (*stack, *inputs, *outputs)."""
        return (*self.stack, *self.inputs, *self.outputs)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements of the plain array."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the plain array."""
        return jnp.dtype(self.plain_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers: codes, scales, nested, mean, offsets."""
        return tree.nbytes(self)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantised again."""
        return self.nested is not None

    @property
    def T(self) -> "QuantizedArray":
        """The transpose of a leaf with two axes, the same codes: an embedding's is the kernel of a head, and back."""
        if self.ndim != 2:
            raise PeftJaxError(f"{self} has {self.ndim} axes, and only of two there is a transpose.")
        return replace(self, inputs=self.outputs, outputs=self.inputs, by_rows=not self.by_rows)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of one entry of the stack."""
        return matrix(self.inputs, self.outputs, self.by_rows)

    @property
    def block(self) -> int:
        """Values in one block."""
        return self.block_size or self.matrix[1]

    @property
    def flat(self) -> bool:
        """Whether blocks run on through the rows."""
        return is_flat(self.quant_type, self.matrix[1], self.block)

    def __repr__(self) -> str:
        double = ", double_quant" if self.nested is not None else ""
        shape = "x".join(map(str, self.shape)) if hasattr(self.codes, "shape") else "?"
        return f"QuantizedArray({self.quant_type}, {shape} {self.plain_dtype}, block {self.block}{double})"


def is_leaf(node: Any) -> bool:
    """Whether a leaf of a tree is quantised."""
    return isinstance(node, QuantizedArray)


def cannot_train(path: str, leaf: QuantizedArray) -> PeftJaxError:
    """What to raise where a quantised leaf is asked to train."""
    return PeftJaxError(f"'{path}' is quantised ({leaf.quant_type}) and cannot train: leave it out of what trains, or "
                        "out of the quantised modules, quantize(exclude_modules=...).")


def matrix(inputs: tuple[int, ...], outputs: tuple[int, ...], by_rows: bool) -> tuple[int, int]:
    """(rows, columns) as the leaf holds them.

    >>> matrix((4, 8), (3,), by_rows=False)
    (3, 32)
    """
    rows, columns = (inputs, outputs) if by_rows else (outputs, inputs)
    return math.prod(rows), math.prod(columns)


def is_flat(quant_type: str, columns: int, block: int) -> bool:
    """Whether rows of so many columns cannot be whole blocks in whole bytes."""
    return columns % block != 0 or (quant_type != "int8" and columns % 2 != 0)
