"""Checksums of arrays, made where the arrays lie, on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp


def checksums(arrays: Any) -> dict[str, jax.Array]:
    """uint32 of each array of a tree, by its path: the sum of its words, each times an odd number of its own, so that a
    bit that turns over always changes it. The same on any mesh."""
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)}
    return _sums(named)


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _sum(jnp.asarray(array)) for name, array in arrays.items()}


def _sum(array: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    words = array.astype(kind) if array.dtype == bool else jax.lax.bitcast_convert_type(array, kind)
    words = words.astype(jnp.uint32)
    for axis in range(words.ndim):  # a factor for each index of each axis, all odd, so that their product is
        words = words * (2 * (2 * axis + 1) * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + 1)
    return words.sum(dtype=jnp.uint32)
