"""The low-rank product s (x A) B, forward and backward, and its update s A B: what the LoRA family shares."""

import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier as barrier

from peft_jax.core.remat import keep


def branch(x: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
    """s (x A) B for x (..., *in), a (*in, r), b (r, *out): (tokens, prod(out)) in x's dtype.

    s stays float32, as bfloat16 has no 0.3 or 1.4, and a merged kernel would be another. Reverse-mode differentiable
    only, see ``_product``.
    """
    rank = a.shape[-1]
    a, b = a.astype(x.dtype).reshape(-1, rank), b.astype(x.dtype).reshape(rank, -1)
    return _product(x.reshape(-1, a.shape[0]), a, b, scaling)


@jax.custom_vjp
def _product(x: jax.Array, a: jax.Array, b: jax.Array, s: jax.Array) -> jax.Array:
    """s (x A) B for x (tokens, in): differentiated by hand, since XLA on a CPU is up to eight times slower at a tall,
    thin gradient of A, (in, r), than at its transpose (LOG.md, 2026-11-24); the barriers keep it from swapping back.
    """
    return scaled(x @ a, s) @ b


def scaled(x: jax.Array, scaling: jax.Array) -> jax.Array:
    """x times a float32 scaling, rounded to x's dtype once."""
    return (x * scaling.astype(jnp.float32)).astype(x.dtype)


def _product_forward(x: jax.Array, a: jax.Array, b: jax.Array, s: jax.Array) -> tuple[jax.Array, tuple]:
    low = keep(x @ a)
    return scaled(low, s) @ b, (x, a, b, s, low)


def _product_backward(kept: tuple, gradient: jax.Array) -> tuple[jax.Array, ...]:
    x, a, b, s, low = kept
    back = gradient @ b.T
    by_a = barrier(barrier(scaled(back, s).T) @ x).T
    by_b = barrier(scaled(low, s).T) @ gradient
    return scaled(back, s) @ a.T, by_a, by_b, jnp.vdot(low, back).astype(s.dtype)


_product.defvjp(_product_forward, _product_backward)


def delta(a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
    """The update s A B, float32 (*stack, *in, *out), of the leaves of one module."""
    stack, rank = scaling.shape, a.shape[-1]
    product = jnp.matmul(a.reshape(*stack, -1, rank), b.reshape(*stack, rank, -1), precision="highest")
    return (product * scaling[..., None, None]).reshape(*a.shape[:-1], *b.shape[len(stack) + 1:])
