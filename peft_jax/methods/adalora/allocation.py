"""How AdaLoRA shares out its ranks (arXiv 2303.10512, eq. 7 to 12), as pure functions of arrays.

An entry of e, a column of A and a row of B make a triplet. Its importance is the mean over its elements of sensitivity
times uncertainty, running means of |parameter times gradient| and of how far that is from its mean. At each cut the
least important triplets of the whole model lose their entry of e, down to a budget that falls as a cubic. An entry that
was cut may grow again until the last cut. Same as Hugging Face peft's RankAllocator.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.core import targeting, tree
from peft_jax.errors import PeftJaxError
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora.init import ranks

FACTORS = ("adalora_a", "adalora_b", "adalora_e")


class Allocation(NamedTuple):
    """What is remembered between steps, trees like the parameters: running means of each factor's elements, and which
    entries of e the last cut left, bool."""

    sensitivity: tree.Tree
    uncertainty: tree.Tree
    held: tree.Tree


def in_ranks(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same ranks in LoRA's words."""
    counts = {key.split(".lora_E")[0]: sum(map(bool, held)) for key, held in (config["rank_pattern"] or {}).items()}
    return {**config, "r": config["init_r"], "rank_pattern": counts}


def modules(config: Mapping[str, Any], params: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    """(folder, which entries of its e are its own: bool (*stack, r)) of each adapted module or stack."""
    found, flat = [], tree.flatten(params)
    for folder in kernel_adapter.folders(flat, "adalora_e"):
        *stack, most = flat[folder + "adalora_e"].shape
        each = ranks(in_ranks(config), targeting.module_names(folder.rstrip("/"), tuple(stack)))
        found.append((folder, np.arange(most) < each.reshape(*stack, 1)))
    return found


def check_steps(config: Mapping[str, Any], total: int) -> None:
    """Raise ``PeftJaxError`` where ``total`` steps have no room for ranks to fall."""
    if min(config["tinit"], config["tfinal"]) < 0 or config["tinit"] >= total - config["tfinal"]:
        raise PeftJaxError(f"tinit={config['tinit']} and tfinal={config['tfinal']} leave none of {total} steps for "
                           "ranks to fall: lower them or train longer.")


def budgets(config: Mapping[str, Any], ranks: int, count: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """(ranks left in all, whether to cut) after each step from 0 to ``total``: int and bool (total + 1,).

    A cubic from ``ranks`` to target_r in each of ``count`` modules.
    """
    first, last, target = config["tinit"], total - config["tfinal"], config["target_r"] * count
    step = np.arange(total + 1)
    falling = ((ranks - target) * (1 - (step - first) / (last - first)) ** 3 + target).astype(int)
    left = np.where(step <= first, ranks, np.where(step > last, target, falling))
    return left, (step > first) & (step <= last) & ((step % config["deltaT"] == 0) | (step == last))


def allocator(config: Mapping[str, Any], total: int) -> tuple[Callable, Callable]:
    """``(start, allocate)`` for a training of ``total`` steps with the AdaLoRA of ``config``; both are pure.

    ``start(params) -> Allocation``; ``allocate(allocation, params, gradients, step) -> (allocation, params)`` after
    each optimiser step, ``step`` counted from 1, with the parameters after it and the gradients before it, as peft's
    ``update_and_allocate``. Trees may hold other leaves, too, which pass through.
    """
    check_steps(config, total)
    last = total - config["tfinal"]

    def start(params: Mapping[str, Any]) -> Allocation:
        flat = {path: leaf for path, leaf in tree.flatten(params).items() if path.rpartition("/")[2] in FACTORS}
        sensitivity, uncertainty = (tree.unflatten({path: jnp.zeros_like(leaf) for path, leaf in flat.items()})
                                    for _ in range(2))
        held = tree.unflatten({f"{f}adalora_e": jnp.asarray(own) for f, own in modules(config, params)})
        return Allocation(sensitivity, uncertainty, held)

    def allocate(allocation: Any, params: Mapping[str, Any], gradients: Mapping[str, Any], step: Any,
                ) -> tuple[Allocation, tree.Tree]:
        flat, parts = tree.flatten(params), modules(config, params)
        ranks, count = (sum(int(part.sum()) for part in found) for found in
                        ([own for _, own in parts], [own.any(-1) for _, own in parts]))
        left, cuts = (jnp.asarray(each)[jnp.minimum(step, total)] for each in budgets(config, ranks, count, total))
        allocation = jax.lax.cond(step < last, partial(_noticed, config, flat, tree.flatten(gradients)),
                                  lambda same: same, allocation)
        held = jax.lax.cond(cuts, partial(_cut, parts, ranks - left), lambda same: same.held, allocation)
        flat |= {path: jnp.where((cuts | (step > last)) & ~stays, 0, flat[path])
                 for path, stays in tree.flatten(held).items()}
        return allocation._replace(held=held), tree.unflatten(flat)

    return start, allocate


def _noticed(config: Mapping[str, Any], flat: Mapping[str, Any], slope: Mapping[str, Any], allocation: Allocation,
            ) -> Allocation:
    """The running means with one more |parameter times gradient|."""
    one, two, sensitivity, uncertainty = config["beta1"], config["beta2"], {}, {}
    doubt = tree.flatten(allocation.uncertainty)
    for path, mean in tree.flatten(allocation.sensitivity).items():
        now = jnp.abs(flat[path] * slope[path])
        sensitivity[path] = one * mean + (1 - one) * now
        uncertainty[path] = two * doubt[path] + (1 - two) * jnp.abs(now - sensitivity[path])
    return allocation._replace(sensitivity=tree.unflatten(sensitivity), uncertainty=tree.unflatten(uncertainty))


def scores(parts: list[tuple[str, np.ndarray]], allocation: Allocation) -> dict[str, jax.Array]:
    """``{path of e: importance of each entry (*stack, r)}`` for ``modules(...)``, infinite where an entry is none."""
    sensitivity, uncertainty = tree.flatten(allocation.sensitivity), tree.flatten(allocation.uncertainty)
    each = {}
    for folder, own in parts:
        a, b, e = (sensitivity[folder + name] * uncertainty[folder + name] for name in FACTORS)
        stack, most = own.shape[:-1], own.shape[-1]
        score = e + a.reshape(*stack, -1, most).mean(-2) + b.reshape(*stack, most, -1).mean(-1)
        each[f"{folder}adalora_e"] = jnp.where(own, score, jnp.inf)
    return each


def _cut(parts: list[tuple[str, np.ndarray]], gone: jax.Array, allocation: Allocation) -> tree.Tree:
    """Which entries of e stay where the ``gone`` least important ones go."""
    each = scores(parts, allocation)
    ordered = jnp.sort(jnp.concatenate([score.ravel() for score in each.values()]))
    threshold = jnp.where(gone > 0, ordered[jnp.maximum(gone - 1, 0)], -1)
    own = {f"{folder}adalora_e": own for folder, own in parts}
    return tree.unflatten({path: (score > threshold) & own[path] for path, score in each.items()})


def optimizer(config: Mapping[str, Any], inner: optax.GradientTransformation, total: int,
             ) -> optax.GradientTransformation:
    """``inner`` with the allocation after each of its steps, over the trainable leaves."""
    start, allocate = allocator(config, config["total_step"] or total)

    def init(params: Any) -> dict[str, Any]:
        return {"step": jnp.zeros((), jnp.int32), "inner": inner.init(params), "allocation": start(params)}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, dict[str, Any]]:
        changes, within = inner.update(updates, state["inner"], params)  # optax's ``updates`` are the gradients
        after, step = optax.apply_updates(params, changes), state["step"] + 1
        allocation, cut = allocate(state["allocation"], after, updates, step)
        changes = jax.tree.map(lambda new, stays, change, old: jnp.where(new == stays, change, -old), after, cut,
                               changes, params)  # p + -p is zero without rounding
        return changes, {"step": step, "inner": within, "allocation": allocation}

    return optax.GradientTransformation(init, update)
