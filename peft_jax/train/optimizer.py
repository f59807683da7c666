"""The optimiser: clip over the trainable part, AdamW, warm-up and decay, a rate for each group of leaves."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import optax

from peft_jax.core import tree
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import FROZEN, TRAINABLE


def _cosine(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, total_steps)


def _linear(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    down = optax.linear_schedule(peak, 0.0, total_steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), down], [warmup])


def _constant(peak: float, warmup: int, total_steps: int) -> optax.Schedule:
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), optax.constant_schedule(peak)], [warmup])


SCHEDULES = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def make_schedule(total_steps: int, *, learning_rate: float, schedule: str = "cosine",
                  warmup_ratio: float = 0.03) -> optax.Schedule:
    """The learning rate of each optimiser step, counted from 0.

    Args:
      total_steps: of the whole training, at least 1.
      learning_rate: the highest, which the warm-up ends in.
      schedule: what follows the warm-up, one of ``SCHEDULES``: ``"cosine"`` and ``"linear"`` fall to 0 at
        ``total_steps``, ``"constant"`` stays.
      warmup_ratio: share of the steps, from 0 to 1, in which the rate rises from 0. As in transformers these are
        ``ceil(total_steps * warmup_ratio)`` steps; at least one step is left after them.

    Raises:
      PeftJaxError: an unknown schedule; the message names the nearest.

    >>> rate = make_schedule(4, learning_rate=1.0, schedule="linear", warmup_ratio=0.5)
    >>> [float(rate(step)) for step in range(5)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if schedule not in SCHEDULES:
        raise PeftJaxError(f"schedule={schedule!r}: {nearest(schedule, SCHEDULES)}")
    warmup = -int(-total_steps * warmup_ratio // 1)
    return SCHEDULES[schedule](learning_rate, min(warmup, total_steps - 1), total_steps)


def make_optimizer(total_steps: int, labels: Mapping[str, Any] | None = None, *, learning_rate: float,
                   schedule: str = "cosine", warmup_ratio: float = 0.03, b1: float = 0.9, b2: float = 0.999,
                   eps: float = 1e-8, weight_decay: float = 0.0, clip_norm: float = 1.0,
                   rates: Mapping[str, float] | None = None, decay_vectors: bool = False,
                   vectors: Sequence[str] = (), around: Callable[[Any, int], Any] | None = None,
                   ) -> optax.GradientTransformation:
    """AdamW for the trainable tree alone. Its moments have the leaves' dtype: keep trainable leaves in float32.

    Args:
      total_steps, learning_rate, schedule, warmup_ratio: as of :func:`make_schedule`.
      labels: ``method.labels(params)``; needed where the method has groups of leaves with rates of their own.
      b1, b2, eps, weight_decay: as of ``optax.adamw``.
      clip_norm: gradients whose global norm, over all trainable leaves, is larger are scaled down to it; 0: never.
      rates: ``{group: factor}``: leaves with that label train at the factor times the learning rate, weight decay
        included. The group "trainable" has the factor 1 where it is not named.
      decay_vectors: whether biases, norms' scales and ``vectors``, ``method.vectors``, decay as well. By default they
        do not, as in transformers: 0 is no place for a factor to be drawn to.
      around: ``method.optimizer`` of a method that changes the steps. It goes around AdamW and behind the clipping, so
        that the gradients it sees are the clipped ones, as in peft.

    Raises:
      PeftJaxError: an unknown schedule, a group without a rate, a rate without its group, a factor that is no finite
        number of at least 0.

    >>> import jax, jax.numpy as jnp
    >>> tx = make_optimizer(10, learning_rate=0.1, schedule="constant", warmup_ratio=0.0)
    >>> leaves = {"lora_a": jnp.ones(3)}
    >>> updates, _ = tx.update({"lora_a": jnp.full(3, 0.5)}, tx.init(leaves), leaves)
    >>> [round(float(one), 4) for one in updates["lora_a"]]  # Adam's first step has the size of the rate
    [-0.1, -0.1, -0.1]
    """
    rate = make_schedule(total_steps, learning_rate=learning_rate, schedule=schedule, warmup_ratio=warmup_ratio)
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    mask = partial(_decays, vectors) if weight_decay and not decay_vectors else None
    adam = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)
    groups = {path: label for path, label in tree.flatten(labels or {}).items() if label != FROZEN}
    factors = _factors(dict(rates or {}), set(groups.values()))
    steps = [adam]
    if not set(factors.values()) <= {1.0}:
        steps.append(optax.multi_transform({group: optax.scale(factor) for group, factor in factors.items()},
                                           tree.unflatten(groups)))
    return optax.chain(clip, *([around(optax.chain(*steps), total_steps)] if around else steps))


def _decays(vectors: Sequence[str], leaves: Mapping[str, Any]) -> tree.Tree:
    """For each leaf whether weight decay acts on it."""
    return tree.map_paths(lambda path, _: not _is_vector(path.rpartition("/")[2], vectors), leaves)


def _is_vector(name: str, vectors: Sequence[str]) -> bool:
    return name in ("bias", "scale", *vectors) or name.endswith("_bias")


def _factors(rates: dict[str, float], groups: set[str]) -> dict[str, float]:
    """``rates``, checked, and the factor 1 of what has none."""
    for group in sorted(groups - rates.keys() - {TRAINABLE}):
        factor = f"{{'{group}': 16}}"
        raise PeftJaxError(f"the method trains the group '{group}' at a rate of its own: give its factor of the "
                           f"learning rate, such as rates={factor}, in a run --config.optim.rates=\"{factor}\".")
    for group, factor in rates.items():
        if group not in groups:
            raise PeftJaxError(f"rates has '{group}', a group of leaves that the method does not have: "
                               f"{nearest(group, groups)}")
        if not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
            raise PeftJaxError(f"rates['{group}']={factor!r}: give a factor of the learning rate, at least 0.")
    return {TRAINABLE: 1.0, **rates}
