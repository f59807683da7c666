"""The ranks and scales of a LoRA, and what A and B start from by ``init_lora_weights``.

For W (in, out) and the scale s:

    True, "gaussian"    A random, B zero
    "orthogonal"        A and B random, their rows and columns on orthogonal halves of the rank, so that A B = 0
    "pissa"             A = U sqrt(S / s), B = sqrt(S / s) V, of the r largest singular values: W = U S V
                        (PiSSA, arXiv 2404.02948, eqs. 2 to 4); "pissa_niter_N" by a randomised SVD with N iterations
    "olora"             A = R[:r]^T, B = Q[:, :r]^T, of the QR decomposition W^T = Q R (OLoRA, arXiv 2406.01775)
    "loftq"             see loftq.py

"pissa" and "olora" split the kernel: W - s A B is what stays frozen, so that the start is the base model to rounding.
Such an adapter is stored as what it adds to the base as it was, s A B - s A0 B0: a plain LoRA of rank 2 r, as peft
converts it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import quant
from peft_jax.core import targeting
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora import loftq

NAMES = (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "loftq")
_NITER = re.compile(r"pissa_niter_(\d+)")


def ranks(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The rank of each module by its name, int (len(names),), 0 where it is not adapted."""
    return np.array([targeting.pattern_value(config["rank_pattern"], name, config["r"]) if chosen else 0
                     for name, chosen in zip(names, kernel_adapter.chosen(config, names))], int)


def scalings(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The scale of each module by its name, float32 (len(names),), 0 where it is not adapted."""
    alphas = np.array([targeting.pattern_value(config["alpha_pattern"], name, config["lora_alpha"]) for name in names])
    rank = ranks(config, names)
    divisor = np.maximum(np.sqrt(rank) if config["use_rslora"] else rank, 1)
    return np.where(rank > 0, alphas / divisor, 0).astype(np.float32)


def check(how: bool | str) -> None:
    """Raise ``PeftJaxError`` for a start that there is not."""
    if how not in NAMES and not _NITER.fullmatch(str(how)):
        raise PeftJaxError(f"init_lora_weights={how!r}: {nearest(str(how), map(str, NAMES))}")


def splits(how: bool | str) -> bool:
    """Whether A B is taken out of the kernel."""
    return how == "olora" or str(how).startswith("pissa")


def changes(how: bool | str) -> bool:
    """Whether the start depends on the kernel's values, and changes them."""
    return splits(how) or how == loftq.NAME


def start(how: bool | str, target: targeting.Target, key: jax.Array, kernel: Any, ranks: np.ndarray,
          scaling: np.ndarray, start_a: Any, loftq_config: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """A (*stack, in, r) and B (*stack, r, out) of a target for ``ranks`` and ``scaling`` (*stack), r the largest rank.

    Zero beyond each layer's own rank. ``start_a`` is A for "eva". For "loftq" the quantised kernel is third. Raises
    ``PeftJaxError`` for ranks that do not fit, and a kernel that is quantised already.
    """
    _, stack, inputs, outputs = target.axes
    shape = (*stack, math.prod(inputs), math.prod(outputs))
    if changes(how) and quant.is_leaf(kernel):
        raise PeftJaxError(f"init_lora_weights={how!r} on '{target.path}' needs the plain kernel, and it is quantised: "
                           f"put the LoRA in front, chain(lora(init_lora_weights={how!r}), quantize(...)).")
    _check_fits(how, target, ranks, scaling, start_a, min(shape[-2:]))
    if how == loftq.NAME:
        return loftq.start(loftq_config, target, kernel, ranks, scaling)
    if target.leaf == "embedding":
        a, b = _embedding(how, key, shape, ranks)
    elif how == "eva":
        a, b = start_a[..., :ranks.max()], jnp.zeros((*stack, ranks.max(), shape[-1]))
    elif splits(how):
        a, b = _split(str(how), key, kernel.reshape(shape).astype(jnp.float32), ranks, scaling)
    else:
        a, b = (_orthogonal if how == "orthogonal" else _random)(how, key, shape, ranks)
    inside = np.arange(ranks.max()) < ranks[..., None]
    return jnp.where(inside[..., None, :], a, 0), jnp.where(inside[..., None], b, 0)


def _check_fits(how: bool | str, target: targeting.Target, ranks: np.ndarray, scaling: np.ndarray, start_a: Any,
                most: int) -> None:
    where = f"init_lora_weights={how!r} on '{target.path}'"
    if how == "eva" and start_a is None:
        raise PeftJaxError(f"{where} needs to see data first: method = method.prepare(model, params, batches).")
    if changes(how) and ranks.max() > most:
        raise PeftJaxError(f"{where}: its kernel has {most} singular values, so a rank of {ranks.max()} is too high.")
    if changes(how) and (scaling[ranks > 0] <= 0).any():
        raise PeftJaxError(f"{where}: lora_alpha must be above 0, the kernel's part is divided by it.")
    if how == "orthogonal" and (ranks % 2).any():
        raise PeftJaxError(f"{where}: every rank must be even, one is {ranks[ranks % 2 > 0][0]}.")


def _uniform(key: jax.Array, shape: tuple[int, ...], bound: float | np.ndarray) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -1, 1) * np.float32(bound)


def _random(how: bool | str, key: jax.Array, shape: tuple[int, ...], ranks: np.ndarray) -> tuple[jax.Array, jax.Array]:
    *stack, width, out = shape
    own = np.maximum(ranks, 1)[..., None, None]  # 0 is a layer without an update; nothing of it is kept
    a = _uniform(key, (*stack, width, ranks.max()), 1 / math.sqrt(width))
    if how == "gaussian":
        a = jax.random.normal(key, a.shape, jnp.float32) * (1 / own).astype(np.float32)
    bound = 1 / np.sqrt(own) if how is False else 0
    return a, _uniform(jax.random.fold_in(key, 1), (*stack, ranks.max(), out), bound)


def _embedding(how: bool | str, key: jax.Array, shape: tuple[int, ...], ranks: np.ndarray,
              ) -> tuple[jax.Array, jax.Array]:
    """A zero and B normal, as peft has it: looked-up rows of a random A would be noise that seldom gets a gradient."""
    *stack, width, out = shape
    a = jax.random.normal(key, (*stack, width, ranks.max())) * (how is False)
    return a, jax.random.normal(jax.random.fold_in(key, 1), (*stack, ranks.max(), out))


def _orthogonal(how: bool | str, key: jax.Array, shape: tuple[int, ...], ranks: np.ndarray,
               ) -> tuple[jax.Array, jax.Array]:
    *stack, width, out = shape
    most, keys = ranks.max(), jax.random.split(key, 3)
    own = np.arange(most) < ranks[..., None]
    square = own[..., None] & own[..., None, :]  # beyond a layer's own rank the identity, which Q then keeps there
    q, _ = jnp.linalg.qr(jnp.where(square, jax.random.normal(keys[0], (*stack, most, most)), np.eye(most)))
    a = jax.random.normal(keys[1], (*stack, width, most // 2)) * own[..., None, ::2]
    b = jax.random.normal(keys[2], (*stack, most // 2, out)) * own[..., ::2, None]
    odd, even = q[..., 0::2, :], q[..., 1::2, :]
    return a @ odd / 10, jnp.swapaxes(even, -1, -2) @ b / 10


def _split(how: str, key: jax.Array, matrix: jax.Array, ranks: np.ndarray, scaling: np.ndarray,
          ) -> tuple[jax.Array, jax.Array]:
    most = int(ranks.max())
    if how == "olora":
        q, r = jnp.linalg.qr(jnp.swapaxes(matrix, -1, -2))
        return jnp.swapaxes(r[..., :most, :], -1, -2), jnp.swapaxes(q[..., :most], -1, -2)
    rounds = _NITER.fullmatch(how)
    u, s, v = (jnp.linalg.svd(matrix, full_matrices=False) if rounds is None
               else _randomised_svd(key, matrix, most, int(rounds[1])))
    root = jnp.sqrt(s[..., :most] / np.where(ranks > 0, scaling, 1)[..., None])
    return u[..., :most] * root[..., None, :], root[..., None] * v[..., :most, :]


def _randomised_svd(key: jax.Array, matrix: jax.Array, rank: int, rounds: int,
                   ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The ``rank`` largest singular values by subspace iteration (Halko et al. 2011, arXiv 0909.4061, alg. 4.4)."""
    across = jnp.swapaxes(matrix, -1, -2)
    basis, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (*matrix.shape[:-2], matrix.shape[-1], rank)))
    for _ in range(rounds):
        back, _ = jnp.linalg.qr(across @ basis)
        basis, _ = jnp.linalg.qr(matrix @ back)
    u, s, v = jnp.linalg.svd(jnp.swapaxes(basis, -1, -2) @ matrix, full_matrices=False)
    return basis @ u, s, v


def doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA's config for twice the ranks at the same scales."""
    factor = math.sqrt(2) if config["use_rslora"] else 2
    ranks = {name: 2 * rank for name, rank in (config["rank_pattern"] or {}).items()}
    alphas = {name: factor * alpha for name, alpha in (config["alpha_pattern"] or {}).items()}
    return {**config, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"], "rank_pattern": ranks,
            "alpha_pattern": alphas}


def difference(a: np.ndarray, b: np.ndarray, a0: np.ndarray, b0: np.ndarray, ranks: np.ndarray,
              ) -> tuple[np.ndarray, np.ndarray]:
    """[A, A0] and [B, -B0] layer by layer, each cut to its own rank of ``ranks`` (*stack) before they are joined."""
    most, front = a.shape[-1], ranks.ndim
    wide = np.zeros((*a.shape[:-1], 2 * most), np.float32)
    tall = np.zeros((*b.shape[:front], 2 * most, *b.shape[front + 1:]), np.float32)
    for entry in np.ndindex(ranks.shape):
        rank = ranks[entry]
        wide[entry][..., :2 * rank] = np.concatenate([a[entry][..., :rank], a0[entry][..., :rank]], -1)
        tall[entry][:2 * rank] = np.concatenate([b[entry][:rank], -b0[entry][:rank]])
    return wide, tall
