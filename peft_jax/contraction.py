"""Which axes a module contracts: of its kernel, and of its input."""

import jax
import jax.numpy as jnp
from flax import linen as nn


def input_count(module: nn.Module) -> int:
    """How many leading axes of a module's kernel are inputs; 0 where that is not known."""
    if isinstance(module, nn.Einsum) and module.einsum_str:
        return _einsum_inputs(module.einsum_str.replace(" ", "").replace("...", ""))
    if isinstance(module, nn.Dense | nn.Embed):
        return 1
    if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
        return len(module.axis) if isinstance(module.axis, (tuple, list)) else 1
    return 0


def input_axes(module: nn.Module, ndim: int) -> tuple[int, ...]:
    """The axes of a Dense or DenseGeneral module's input that its kernel contracts."""
    axis = getattr(module, "axis", -1)
    return tuple(i % ndim for i in (axis if isinstance(axis, (tuple, list)) else (axis,)))


def inputs_last(module: nn.Module, x: jax.Array) -> jax.Array:
    """The module's input with the axes that its kernel contracts moved to the end."""
    axis = input_axes(module, x.ndim)
    return jnp.moveaxis(x, axis, range(-len(axis), 0))


def inputs_back(module: nn.Module, x: jax.Array) -> jax.Array:
    """The inverse of :func:`inputs_last`."""
    axis = input_axes(module, x.ndim)
    return jnp.moveaxis(x, range(-len(axis), 0), axis)


def _einsum_inputs(formula: str) -> int:
    """Of ``x,kernel->result``: the kernel's contracted axes, where they stand in front and no axis is in all three.

    >>> _einsum_inputs("bnh,nhd->bd"), _einsum_inputs("bd,ndh->bnh"), _einsum_inputs("bnh,nhd->bnd")
    (2, 0, 0)
    """
    sides, result = formula.split("->")
    x, kernel = sides.split(",")
    contracted = "".join(letter for letter in kernel if letter not in result)
    plain = kernel.startswith(contracted) and set(contracted) <= set(x) and not set(kernel) & set(x) & set(result)
    return len(contracted) if plain else 0
