"""LoKr, a Kronecker product as the update (KronA, arXiv 2212.10650, eq. 3; LyCORIS, arXiv 2309.14859).

    y = x W + (alpha / r) x (W1 (x) W2)        (x) the Kronecker product

The inputs are taken as in_m rows of in_n, the outputs as out_l rows of out_k, in_m <= in_n and out_l <= out_k as near
to ``decompose_factor`` as they divide (-1: to the square root). Then x (W1 (x) W2) = W1' X W2 for x as a matrix X: the
product is never built but for merging. Beside each adapted ``kernel`` stand ``lokr_w1`` (*stack, in_m, out_l), or with
``decompose_both`` its factors ``lokr_w1_a`` (*stack, r, out_l) and ``lokr_w1_b`` (*stack, in_m, r); ``lokr_w2_a``
(*stack, r, out_k) and ``lokr_w2_b`` (*stack, in_n, r), or, where r is at least half of their larger side, ``lokr_w2``
(*stack, in_n, out_k) itself; and the frozen ``lokr_scaling`` (*stack).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import kernel_axes, tree, validation
from peft_jax.core.peft_format import Format, arguments_of
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method, check_leaves
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora.low_rank import scaled
from peft_jax.methods.lycoris import common
from peft_jax.quant import plain

FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
LEAVES = (*FACTORS, "lokr_scaling")


def lokr(r: int = 8, alpha: float = 8, target_modules: Patterns = ("q_proj", "v_proj"), rank_dropout: float = 0.0,
         module_dropout: float = 0.0, *, decompose_both: bool = False, decompose_factor: int = -1,
         rank_dropout_scale: bool = False, exclude_modules: Patterns = None,
         layers_to_transform: int | tuple[int, ...] | None = None, layers_pattern: Patterns = None,
         rank_pattern: Mapping[str, int] | None = None, alpha_pattern: Mapping[str, float] | None = None,
         modules_to_save: tuple[str, ...] | None = None, init_weights: bool | str = True) -> Method:
    """LoKr with the arguments, meanings and defaults of Hugging Face peft's ``LoKrConfig``, linear modules only.

    Args:
      r: rank of the factors. alpha: numerator of the scale alpha / r, also where no factor has a rank.
      decompose_both: whether W1 is a product of rank r too, where r is below half of its larger side.
      decompose_factor: what in_m and out_l are at most; -1 for near the square root.
      rank_dropout: probability that an output element of the update is off; with rank_dropout_scale the others are
        raised to keep their mean. module_dropout: probability that a module's whole update is off. Both need
        ``rngs={"dropout": key}``.
      rank_pattern, alpha_pattern: ``{regex for the end of a name: value}``, exceptions from r and alpha.
      init_weights: True starts W1 (or its a) at zero, "lycoris" W2 (or its b), False neither (not the base model at
        the start; for tests).
      The others as of :func:`peft_jax.lora`.

    Returns a :class:`Method`; its leaves are float32.

    >>> method = lokr(r=1, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items()}  # 6 = 2 * 3, 8 = 2 * 4
    {'kernel': (6, 8), 'lokr_w1': (2, 2), 'lokr_w2_a': (1, 4), 'lokr_w2_b': (3, 1), 'lokr_scaling': ()}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing and for ranks of
    which some call for factors and others, in the same stack, do not.
    """
    config = common.tidy(
        (True, False, "lycoris"), peft_type="LOKR", r=r, alpha=alpha, target_modules=target_modules,
        rank_dropout=rank_dropout, module_dropout=module_dropout, decompose_both=decompose_both,
        decompose_factor=decompose_factor, rank_dropout_scale=rank_dropout_scale, exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform, layers_pattern=layers_pattern, rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern, modules_to_save=modules_to_save, init_weights=init_weights)
    validation.check_switches(config, "decompose_both", "rank_dropout_scale")
    if not isinstance(decompose_factor, int) or (decompose_factor < 1 and decompose_factor != -1):
        raise PeftJaxError(f"decompose_factor={decompose_factor!r}: a whole number of at least 1, or -1.")
    method = kernel_adapter.method(config, trained=FACTORS, switch="lokr_scaling", leaves=_leaves,
                                   intercept=partial(_intercept, config), stored=FORMAT)
    padding = partial(common.padding, config=config, leaves=FACTORS, scaling="lokr_scaling")
    return method._replace(fold=_merge, padding=padding)


def divided(width: int, most: int = -1) -> tuple[int, int]:
    """``(m, n)`` with m * n = width: m = most where that divides, else m <= n with the smallest sum and m <= most.

    >>> divided(128), divided(128, 4), divided(128, 5), divided(127)
    ((8, 16), (4, 32), (4, 32), (1, 127))
    """
    if most > 0 and width % most == 0:
        return most, width // most
    limit = math.isqrt(width) if most == -1 else min(most, math.isqrt(width))
    m = max(m for m in range(1, limit + 1) if width % m == 0)
    return m, width // m


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    _, stack, inputs, outputs = target.axes
    each = common.ranks(config, target.names).reshape(stack)
    most = int(each.max())
    (m, n), (l, k) = (divided(math.prod(side), config["decompose_factor"]) for side in (inputs, outputs))  # noqa: E741
    whole_first = _whole(target, each, max(l, m)) if config["decompose_both"] else True
    shapes = _shapes("lokr_w1", m, l, most, whole_first) | _shapes("lokr_w2", n, k, most, _whole(target, each,
                                                                                                 max(k, n)))
    zero = {True: ("lokr_w1", "lokr_w1_a"), "lycoris": ("lokr_w2", "lokr_w2_b"), False: ()}[config["init_weights"]]
    new = {name: common.factor(jax.random.fold_in(key, FACTORS.index(name)), (*stack, *shape), fan_in, each, name,
                                name in zero) for name, (shape, fan_in) in shapes.items()}
    return {**new, "lokr_scaling": common.scalings(config, target)}


def _whole(target: Target, each: np.ndarray, side: int) -> bool:
    """Whether a matrix stands by itself: the rank is at least half its larger side."""
    answers = {bool(rank >= side / 2) for rank in each.ravel() if rank}
    if len(answers) > 1:
        raise PeftJaxError(f"rank_pattern gives some layers of the stack '{target.path}' factors and others, of a rank "
                           f"of {side / 2:g} or more, a whole matrix: choose ranks on one side of that.")
    return answers.pop()


def _shapes(name: str, inside: int, outside: int, rank: int, whole: bool) -> dict[str, tuple[tuple[int, int], int]]:
    """``{leaf: (shape, the second side of peft's tensor, by which it is scaled)}``."""
    if whole:
        return {name: ((inside, outside), inside)}
    return {f"{name}_a": ((rank, outside), rank), f"{name}_b": ((inside, rank), inside)}


def _intercept(config: Mapping[str, Any], next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any,
               ) -> Any:
    y, module = next_fun(*args, **kwargs), context.module
    if (scaling := kernel_adapter.read(module, context, ("lokr_scaling",), "LoKr")) is None:
        return y
    factors = {name: module.get_variable("params", name) for name in FACTORS if module.has_variable("params", name)}
    x = kernel_axes.inputs_last(module, args[0]).astype(y.dtype)
    change = common.thinned(module, context, branch(x, factors, *scaling), config, config["rank_dropout_scale"])
    return y + change.reshape(y.shape)


def branch(x: jax.Array, factors: Mapping[str, jax.Array], scaling: jax.Array) -> jax.Array:
    """(alpha / r) x (W1 (x) W2) for x (..., inputs): (tokens, out) in x's dtype."""
    factors = {name: leaf.astype(x.dtype) for name, leaf in factors.items()}
    first = _matrix(factors, "lokr_w1")
    rest = factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_b"]
    rows = x.reshape(-1, rest.shape[0]) @ rest
    if "lokr_w2_a" in factors:
        rows = rows @ factors["lokr_w2_a"]
    mixed = jnp.einsum("tmk,ml->tlk", rows.reshape(-1, first.shape[0], rows.shape[-1]), first)
    return scaled(mixed.reshape(len(mixed), -1), scaling)


def _matrix(factors: Mapping[str, jax.Array], name: str) -> jax.Array:
    """W1 or W2 (..., in, out), its factors multiplied where it has such."""
    if name in factors:
        return factors[name]
    return jnp.matmul(factors[f"{name}_b"], factors[f"{name}_a"], precision="highest")


def _merge(params: Mapping[str, Any]) -> tree.Tree:
    """Add the update to each kernel, in float32, back to the kernel's dtype; the leaves are gone afterwards."""
    check_leaves(LEAVES, params, "LOKR")
    flat = tree.flatten(params)
    for folder in kernel_adapter.folders(flat, "lokr_scaling"):
        factors = {name: flat.pop(folder + name) for name in FACTORS if folder + name in flat}
        scaling, kernel = flat.pop(folder + "lokr_scaling"), flat[folder + "kernel"]
        product = jnp.einsum("...ml,...nk->...mnlk", _matrix(factors, "lokr_w1"), _matrix(factors, "lokr_w2"))
        change = (product * scaling.reshape(*scaling.shape, 1, 1, 1, 1)).reshape(kernel.shape)
        flat[folder + "kernel"] = (plain(kernel, jnp.float32) + change).astype(kernel.dtype)
    return tree.unflatten(flat)


# An effective decomposition is for convolutions alone, which are not adapted here.
FORMAT = Format(kind="LOKR", make=lokr, arguments=arguments_of(lokr),
                slots=partial(common.slots, FACTORS, "lokr_scaling"), fields=common.fields,
                silent=("use_effective_conv2d",))
