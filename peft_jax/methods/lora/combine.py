"""Several LoRA adapters into one, as Hugging Face peft's ``add_weighted_adapter``.

Task arithmetic (arXiv 2212.04089, section 2), TIES (2306.01708, section 4), DARE (2311.03099, eqs. 3 and 4), pruning by
magnitude; on A and B apart, or (``..._svd``) on the updates s A B, which are then cut to a rank.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import arguments, targeting, tree, validation
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora.init import ranks, scalings
from peft_jax.methods.lora.leaves import check_pair, on_base
from peft_jax.methods.lora.lora import lora
from peft_jax.methods.lora.peft_file import LEAVES

Adapter = tuple[Method, Mapping[str, Any]]
Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (adapters, *shape), (adapters,) weights -> (*shape)


def weighted_adapter(adapters: Sequence[Adapter], weights: Sequence[float], base_params: Mapping[str, Any],
                     combination_type: str = "svd", *, svd_rank: int | None = None, density: float | None = None,
                     majority_sign_method: str = "total", rng: np.random.Generator | None = None) -> Adapter:
    """A new LoRA adapter that combines others of the same base; they and the base stay as they are.

    Args:
      adapters: ``(method, params)`` each, as ``load_adapter`` gives them.
      weights: one finite number per adapter; may be negative.
      combination_type: "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune" (equal ranks only), the same
        with "_svd" behind ("svd" for linear; any ranks), or "cat" (exact; the ranks add up).
      svd_rank: rank after an "svd", at least 1; the largest of the adapters' by default.
      density: share of the values that pruning keeps, from 0 to 1.
      majority_sign_method: "total" or "frequency", for ties.
      rng: draws what DARE drops.

    Returns ``(method, params)``: a plain LoRA with scale 1.

    Raises ``PeftJaxError`` for unknown words, unequal ranks where they must be equal, numbers out of range, a missing
    density or rng, and adapters that are no plain LoRA or do not fit the base.
    """
    arguments.check("weighted_adapter", {"base_params": base_params})
    _check_lists(adapters, weights)
    sizes = _finite(weights)
    if svd_rank is not None:
        validation.check_rank("svd_rank", svd_rank)
    combine = _combination(combination_type, density, majority_sign_method, rng)
    trained = [_layers(number, method, params, base_params) for number, (method, params) in enumerate(adapters)]
    most = [max(a.shape[1] for a, _, _ in layers.values()) for layers in trained]
    rank, join = _joiner(combination_type, combine, most, svd_rank)
    names = list(dict.fromkeys(name for layers in trained for name in layers))
    joined = {}
    for name in names:
        mine = [(layers[name], weight) for layers, weight in zip(trained, sizes, strict=True) if name in layers]
        joined[name] = join([layer for layer, _ in mine], np.array([weight for _, weight in mine], np.float32))
    return _as_method(joined, rank, adapters, base_params)


def _check_lists(adapters, weights) -> None:
    """Raise ``PeftJaxError`` unless there is a list of pairs and one of as many weights."""
    for name, value in {"adapters": adapters, "weights": weights}.items():
        if not hasattr(value, "__len__") or isinstance(value, str | Mapping):
            raise PeftJaxError(f"weighted_adapter: {name} is a {type(value).__name__}: give a list, one entry for each "
                               "adapter.")
    if not len(adapters) or len(adapters) != len(weights):
        raise PeftJaxError(f"weighted_adapter: {len(adapters)} adapters and {len(weights)} weights: one for each.")
    for number, pair in enumerate(adapters):
        check_pair(pair, f"weighted_adapter: adapter {number}")


def _finite(weights) -> np.ndarray:
    try:
        numbers = np.array([float(weight) for weight in weights if not isinstance(weight, str | bool)], np.float32)
    except (TypeError, ValueError):
        numbers = np.array([])
    if len(numbers) < len(weights) or not np.isfinite(numbers).all():
        raise PeftJaxError(f"weighted_adapter: the weights are {list(weights)}: give a finite number for each adapter.")
    return numbers


def _combination(kind: str, density, sign_method: str, rng) -> Combine:
    if not isinstance(kind, str) or not isinstance(sign_method, str):
        raise PeftJaxError(f"combination_type={kind!r}, majority_sign_method={sign_method!r}: give two words, such as "
                           "'svd' and 'total'.")
    if sign_method not in ("total", "frequency"):
        raise PeftJaxError(f"majority_sign_method='{sign_method}': {nearest(sign_method, ('total', 'frequency'))}")
    if kind not in KINDS:
        raise PeftJaxError(f"combination_type='{kind}': {nearest(kind, KINDS)}")
    plain = "linear" if kind in ("svd", "cat") else kind.removesuffix("_svd")
    prune, join = STEPS[plain]
    number = isinstance(density, int | float | np.number) and not isinstance(density, bool)
    if prune is not None and not (number and 0 <= density <= 1):
        raise PeftJaxError(f"combination_type='{kind}' needs density, the share of values to keep, from 0 to 1; it is "
                           f"{density}.")
    if prune is _drop and not isinstance(rng, np.random.Generator):
        raise PeftJaxError(f"combination_type='{kind}' drops at random: give rng=np.random.default_rng(seed).")

    def combine(tensors, weights):
        sparse = tensors if prune is None or density == 1 else np.stack([prune(t, density, rng) for t in tensors])
        return join(sparse, weights.reshape(-1, *[1] * (tensors.ndim - 1)), sign_method)

    return combine


def _keep_largest(tensor, density, rng):
    """The ``density`` share of values that are largest in magnitude; the others zero."""
    count = int(density * tensor.size)
    mask = np.zeros(tensor.size, bool)
    mask[np.argsort(-np.abs(tensor), axis=None, kind="stable")[:count]] = True
    return np.where(mask.reshape(tensor.shape), tensor, 0)


def _drop(tensor, density, rng):
    """Each value kept with probability ``density`` and divided by it."""
    return np.where(rng.random(tensor.shape) < density, tensor / max(density, np.finfo(np.float32).tiny), 0)


def _sum(tensors, weights, sign_method):
    return (tensors * weights).sum(0)


def _elect(tensors, weights, sign_method):
    """The mean of the values whose sign is the majority's."""
    votes = tensors.sum(0) if sign_method == "total" else np.sign(tensors).sum(0)
    agree = np.sign(tensors) == np.where(votes >= 0, 1, -1)
    return (tensors * weights * agree).sum(0) / np.maximum(agree.sum(0), 1)


STEPS = {"linear": (None, _sum), "magnitude_prune": (_keep_largest, _sum), "ties": (_keep_largest, _elect),
         "dare_linear": (_drop, _sum), "dare_ties": (_drop, _elect)}
KINDS = ("svd", "cat", *STEPS, *(f"{name}_svd" for name in STEPS if name != "linear"))


def _layers(number: int, method: Method, params, base_params) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """``{name of a module in a layer: (a (*in, r), b (r, *out), scale)}`` of the adapted ones."""
    config, modules = on_base(method, params, base_params, f"weighted_adapter: adapter {number}")
    by_name = {}
    for folder, leaves in modules.items():
        a, b, scaling = (leaf.astype(np.float32) for leaf in leaves)
        names = targeting.module_names(folder.rstrip("/"), scaling.shape)
        own = zip(np.ndindex(*scaling.shape), names, ranks(config, names), scalings(config, names))
        by_name |= {name: (a[entry][..., :r].reshape(-1, r), b[entry][:r].reshape(r, -1), float(scale))
                  for entry, name, r, scale in own if r}
    return by_name


def _joiner(kind: str, combine: Combine, most: list[int], svd_rank) -> tuple[int, Callable]:
    """The new rank, and what makes A (in, r) and B (r, out) of one layer."""
    if kind == "cat":
        return sum(most), _concatenate
    if kind.endswith("svd"):
        rank = svd_rank or max(most)
        return rank, partial(_by_svd, combine, rank)
    if len(set(most)) > 1:
        raise PeftJaxError(f"combination_type='{kind}' needs adapters of one rank, these have {most}: use "
                           f"'{kind}_svd', 'svd' or 'cat'.")
    return most[0], partial(_by_parts, combine)


def _concatenate(layers, weights):
    a = np.concatenate([a * (weight * scale) for (a, _, scale), weight in zip(layers, weights, strict=True)], axis=1)
    return a, np.concatenate([b for _, b, _ in layers])


def _by_parts(combine, layers, weights):
    """Half of each weight's size to A and half to B, its sign to A."""
    if len({a.shape[1] for a, _, _ in layers}) > 1:
        raise PeftJaxError("the adapters' rank_pattern differ: combine them with an '..._svd' or 'cat'.")
    scaled = weights * np.array([scale for _, _, scale in layers], np.float32)
    root = np.sqrt(np.abs(scaled))
    sign = np.where(scaled >= 0, 1, -1).astype(np.float32)
    a, b = (np.stack([layer[i] for layer in layers]) for i in (0, 1))
    return combine(a, root * sign), combine(b, root)


def _by_svd(combine, rank, layers, weights):
    updates = np.stack([(a @ b) * np.float32(scale) for a, b, scale in layers])
    left, size, right = np.linalg.svd(combine(updates, weights).astype(np.float32), full_matrices=False)
    return left[:, :rank], size[:rank, None] * right[:rank]


def _as_method(joined, rank: int, adapters: Sequence[Adapter], base_params) -> Adapter:
    """A LoRA of one rank and scale 1 on the modules of ``joined``; ranks that a layer does not use are zeros."""
    first = adapters[0][0].config
    same = all(kernel_adapter.selection(method.config) == kernel_adapter.selection(first) for method, _ in adapters)
    chosen = kernel_adapter.selection(first) if same else {"target_modules": tuple(joined)}
    method = lora(r=rank, lora_alpha=rank, **chosen)
    flat = dict(tree.flatten(method.init(jax.random.key(0), base_params)))
    for folder in kernel_adapter.folders(flat, LEAVES[0]):
        a, b, scaling = (np.zeros(flat[folder + leaf].shape, np.float32) for leaf in LEAVES)
        for entry, name in zip(np.ndindex(*scaling.shape), targeting.module_names(folder.rstrip("/"), scaling.shape)):
            if name in joined:
                mine, other = joined[name]
                own = mine.shape[1]
                a[entry][..., :own] = mine.reshape(*a[entry].shape[:-1], own)
                b[entry][:own] = other.reshape(own, *b[entry].shape[1:])
        flat |= {f"{folder}lora_a": jnp.asarray(a), f"{folder}lora_b": jnp.asarray(b)}
    return method, tree.unflatten(flat)
