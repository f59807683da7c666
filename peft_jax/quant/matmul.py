"""Products with a kernel or embedding that may be quantised; their backward pass decodes again and keeps nothing.

QLoRA, arXiv:2305.14314, equations 5 and 6. A quantised leaf is frozen: its cotangent is zero.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier as barrier

from peft_jax.errors import PeftJaxError
from peft_jax.quant.decode import decode, float_scales, matrices
from peft_jax.quant.qarray import QuantizedArray, matrix


def dot(x, kernel, dtype=None, axes: int = 1):
    """x (..., *inputs) times a leaf or an array (*inputs, *outputs): (..., *outputs) in ``dtype``.

    ``dtype`` is computed in, by default what x and the kernel promote to; ``axes`` is the number of an array's input
    axes, a leaf knows its own. Reverse-mode differentiable only, in x where the kernel is a leaf. Raises
    ``PeftJaxError`` where x does not end in the inputs, or a stack is left in front of the leaf.

    >>> from peft_jax import quantize_array
    >>> x, kernel = jnp.ones((2, 5, 64)), jnp.ones((64, 3))
    >>> dot(x, quantize_array(kernel)).shape, float(dot(x, quantize_array(kernel))[0, 0, 0])
    ((2, 5, 3), 64.0)
    """
    dtype = jnp.result_type(x.dtype, kernel.dtype) if dtype is None else dtype
    quantised = isinstance(kernel, QuantizedArray)
    inputs = kernel.inputs if quantised else kernel.shape[:axes]
    outputs = kernel.outputs if quantised else kernel.shape[axes:]
    front = x.shape[:x.ndim - len(inputs)]
    if x.shape[len(front):] != inputs:
        raise PeftJaxError(f"x of shape {x.shape} does not end in the kernel's inputs {inputs}.")
    rows = x.astype(dtype).reshape(-1, matrix(inputs, outputs, by_rows=True)[0])
    if quantised:
        y: Any = _product(rows, _without_stack(kernel), not kernel.by_rows)
    else:
        y = rows @ kernel.astype(dtype).reshape(rows.shape[-1], -1)
    return y.reshape(*front, *outputs)


def attend(x, embedding, dtype=None):
    """x (..., hidden) times an embedding (vocab, hidden), transposed: (..., vocab), the logits of a tied head."""
    dtype = jnp.result_type(x.dtype, embedding.dtype) if dtype is None else dtype
    if embedding.ndim != 2 or x.shape[-1] != embedding.shape[-1]:
        raise PeftJaxError(f"x of shape {x.shape} does not fit an embedding of shape {embedding.shape}.")
    rows = x.astype(dtype).reshape(-1, x.shape[-1])
    if isinstance(embedding, QuantizedArray):
        y: Any = _product(rows, embedding, embedding.by_rows)
    else:
        y = rows @ embedding.astype(dtype).T
    return y.reshape(*x.shape[:-1], embedding.shape[0])


def take(embedding, ids, dtype=None):
    """Rows ``ids`` (...) of an embedding (vocab, *features), as (..., *features); decodes those rows only.

    As ``jnp.take``: ids from -vocab to -1 count from the end, others out of range give NaN. Raises ``PeftJaxError`` for
    ids that are no integers, and for a leaf not made with ``by_rows``.
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise PeftJaxError(f"rows of an embedding are looked up by whole numbers, and the ids are {ids.dtype}.")
    dtype = embedding.dtype if dtype is None else dtype
    if not isinstance(embedding, QuantizedArray):
        return jnp.take(embedding, ids, axis=0).astype(dtype)
    if not embedding.by_rows or len(embedding.inputs) != 1:
        raise PeftJaxError(f"{embedding} is no embedding: quantise it with inputs=(vocab,) and by_rows=True.")
    count = _without_stack(embedding).matrix[0]
    most = min(jnp.iinfo(ids.dtype).max, 2**31 - 1)
    ids = jnp.minimum(ids, most).astype(jnp.int32)  # -count does not fit unsigned ones, count not those of eight bits
    known = (ids >= -count) & (ids < count)
    places = jnp.where(known, jnp.where(ids < 0, ids + count, ids), 0)
    values = (_flat_rows if embedding.flat else _whole_rows)(embedding, places)
    values = jnp.where(known[..., None], values, jnp.nan).astype(dtype)
    return values.reshape(*ids.shape, *embedding.outputs)


def _whole_rows(leaf: QuantizedArray, places):
    offsets = None if leaf.offsets is None else leaf.offsets[places]
    return decode(leaf.codes[places], float_scales(leaf)[places], offsets, leaf.quant_type, leaf.block, leaf.matrix[1])


def _flat_rows(leaf: QuantizedArray, places):
    """Rows that blocks run through: value by value, each with its block's scale."""
    at = places[..., None] * leaf.matrix[1] + jnp.arange(leaf.matrix[1])
    scales = float_scales(leaf)[0, at // leaf.block][..., None]
    offsets = None if leaf.offsets is None else leaf.offsets[0, at // leaf.block][..., None]
    if leaf.quant_type == "int8":
        return decode(leaf.codes[0, at][..., None], scales, offsets, leaf.quant_type, 1, 1)[..., 0]
    byte = leaf.codes[0, at // 2]
    nibble = jnp.where(at % 2 == 0, byte >> 4, byte & 15) << 4
    return decode(nibble[..., None], scales, offsets, leaf.quant_type, 1, 1)[..., 0]


def _without_stack(leaf: QuantizedArray) -> QuantizedArray:
    if leaf.stack:
        raise PeftJaxError(f"{leaf} has a stack of {leaf.stack} in front: multiply inside nn.scan, lax.scan or vmap.")
    return leaf


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, leaf, transposed: bool) -> Any:
    """x (tokens, columns) times the leaf's matrix (rows, columns) transposed, or x (tokens, rows) times it as it is.

    By hand, since plain autodiff would keep every decoded matrix for the backward pass.
    """
    if leaf.product == "plain":
        return _decoded(transposed, x, leaf)
    from peft_jax.quant import pallas  # here, as importing Pallas takes half a second

    return pallas.multiply(x, leaf, transposed, partial(_decoded, transposed))


def _decoded(transposed, x, leaf):
    weights = matrices(_once_there_is(x, _together(leaf)), x.dtype)
    return x @ (weights.T if transposed else weights)


def _together(leaf: QuantizedArray) -> QuantizedArray:
    """The leaf, its codes brought to where the product needs them: decoded first, they would be 4 to 8 times as many
    bytes on the way."""
    if leaf.gathered is None:
        return leaf
    parts = {name: jax.lax.with_sharding_constraint(part, leaf.gathered) for name in ("codes", "scales", "offsets")
             if (part := getattr(leaf, name)) is not None}
    return replace(leaf, **parts)


def _product_forward(x, leaf, transposed):
    return _product(x, leaf, transposed), leaf


def _product_backward(transposed, leaf, gradient):
    return _product(gradient, leaf, not transposed), None


_product.defvjp(_product_forward, _product_backward)


def _once_there_is(x, leaf: QuantizedArray) -> QuantizedArray:
    """The leaf, to be decoded when ``x`` is there and not before: XLA would decode all kernels of a step at its start,
    or find in the backward pass what the forward pass had decoded, and keep it.

    On a CPU XLA forgets barriers before it orders the program, so there the scales take part in x: a zero that the
    compiler does not see through is added to them.
    """
    def add_nothing(leaf, x):
        bits = jax.lax.bitcast_convert_type(x[:1, :1].reshape(()).astype(jnp.float32), jnp.uint32)
        return replace(leaf, scales=leaf.scales + (bits >> 16 >> 16).astype(leaf.scales.dtype))

    if not x.size:
        return leaf
    return jax.lax.platform_dependent(leaf, x, cpu=add_nothing, default=lambda leaf, x: barrier((leaf, x))[0])
