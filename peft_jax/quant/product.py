"""Products with a quantised weight. The backward pass decodes it again: plain differentiation would keep every decoded
weight for it, and take more memory than a base that was never quantised.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import float0

from peft_jax.quant.codecs import decode, matrix, scales_of
from peft_jax.quant.leaf import QuantizedArray


def dot(x: jax.Array, leaf: QuantizedArray) -> jax.Array:
    """x (..., *inputs) times the weight (*inputs, *outputs): (..., *outputs) in x's dtype, in which it is computed.

    The weight is frozen: its cotangent is zero. Only reverse-mode differentiable.
    """
    tokens = x.shape[:x.ndim - len(leaf.inputs)]
    flat = x.reshape(-1, math.prod(leaf.inputs))  # two axes: products of three are slower on a CPU (DESIGN.md)
    return _product(not leaf.by_rows, flat, leaf).reshape(*tokens, *leaf.outputs)


def attend(x: jax.Array, leaf: QuantizedArray) -> jax.Array:
    """States x (..., width) times an embedding (ids, width), transposed: logits (..., ids)."""
    return _product(leaf.by_rows, x.reshape(-1, x.shape[-1]), leaf).reshape(*x.shape[:-1], leaf.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(over_columns, x, leaf):
    """x (T, C) times the transposed matrix (R, C), or x (T, R) times the matrix: (T, R) or (T, C)."""
    if leaf.product == "plain":
        return _plain(over_columns, x, leaf)
    from peft_jax.quant import kernel  # here, as importing Pallas takes half a second

    return kernel.multiply(x, leaf, over_columns, partial(_plain, over_columns))


def _plain(over_columns, x, leaf):
    weight = matrix(leaf).astype(x.dtype)
    return jax.lax.dot_general(x, weight, (((1,), (1 if over_columns else 0,)), ((), ())))


def _product_forward(over_columns, x, leaf):
    return _product(over_columns, x, leaf), leaf


def _product_backward(over_columns, leaf, gradient):
    return _product(not over_columns, gradient, leaf), _zeros(leaf)


_product.defvjp(_product_forward, _product_backward)


def take(leaf: QuantizedArray, ids: jax.Array, dtype=None) -> jax.Array:
    """The rows of an embedding (ids, width) for ids (...): (..., width); of rows of whole blocks no others are decoded.

    As ``jnp.take``: ids beyond the embedding give NaN.
    """
    dtype = dtype or leaf.dtype
    if leaf.grid.rows != leaf.shape[0] or not leaf.by_rows:
        values = matrix(leaf)
        return jnp.take(values if leaf.by_rows else values.T, ids, axis=0).astype(dtype)
    inside = (ids >= -leaf.shape[0]) & (ids < leaf.shape[0])
    offsets = None if leaf.offsets is None else leaf.offsets[ids]
    rows = decode(leaf, leaf.codes[ids], scales_of(leaf)[ids], offsets)
    return jnp.where(inside[..., None], rows, jnp.nan).astype(dtype)


def _zeros(leaf):
    """The cotangent of a leaf that is not trained."""
    return jax.tree.map(lambda buffer: jnp.zeros_like(buffer) if jnp.issubdtype(buffer.dtype, jnp.floating)
                        else np.zeros(buffer.shape, float0), leaf)
