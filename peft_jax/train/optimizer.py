"""The optimiser: clip over the trainable part, AdamW, warm-up and decay, a rate for each group of leaves."""

from collections.abc import Mapping
from typing import Any

import optax

from peft_jax.core import tree
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import FROZEN, TRAINABLE


def _cosine(optim, steps, warmup):
    return optax.warmup_cosine_decay_schedule(0.0, optim.learning_rate, warmup, steps)


def _linear(optim, steps, warmup):
    down = optax.linear_schedule(optim.learning_rate, 0.0, steps - warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, optim.learning_rate, warmup), down], [warmup])


def _constant(optim, steps, warmup):
    return optax.join_schedules([optax.linear_schedule(0.0, optim.learning_rate, warmup),
                                 optax.constant_schedule(optim.learning_rate)], [warmup])


SCHEDULES = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def make_schedule(optim, total_steps: int) -> optax.Schedule:
    """Learning rate per optimiser step: up over ``warmup_ratio`` of the run, then ``optim.schedule``.

    As in transformers, warm-up takes ``ceil(total_steps * warmup_ratio)`` steps. Raises ``PeftJaxError`` for an unknown
    schedule.
    """
    if optim.schedule not in SCHEDULES:
        raise PeftJaxError(f"optim.schedule={optim.schedule!r}: {nearest(optim.schedule, SCHEDULES)}")
    warmup = -int(-total_steps * optim.warmup_ratio // 1)
    return SCHEDULES[optim.schedule](optim, total_steps, min(warmup, total_steps - 1))


def make_optimizer(optim, total_steps: int, labels: Mapping[str, Any] | None = None) -> optax.GradientTransformation:
    """AdamW for the trainable tree alone; moments take the leaves' dtype, so keep trainables in float32.

    ``labels`` are ``method.labels(params)``; leaves of the group g train at ``optim.rates[g]`` times the learning rate,
    weight decay included, the group "trainable" at the rate itself where it is not named. Raises ``PeftJaxError`` for
    a group without a rate and a rate without its group.
    """
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    adam = optax.adamw(make_schedule(optim, total_steps), optim.b1, optim.b2, optim.eps,
                       weight_decay=optim.weight_decay)
    groups = {path: label for path, label in tree.flatten(labels or {}).items() if label != FROZEN}
    rates = _rates(dict(optim.rates or {}), set(groups.values()))
    if set(rates.values()) <= {1.0}:
        return optax.chain(clip, adam)
    scales = {group: optax.scale(rate) for group, rate in rates.items()}
    return optax.chain(clip, adam, optax.multi_transform(scales, tree.unflatten(groups)))


def _rates(given: dict[str, float], groups: set[str]) -> dict[str, float]:
    for group in sorted(groups - given.keys() - {TRAINABLE}):
        raise PeftJaxError(f"the method trains the group '{group}' at a rate of its own: give its factor of the "
                           f"learning rate, such as --config.optim.rates=\"{{'{group}': 16}}\".")
    for group, rate in given.items():
        if group not in groups:
            raise PeftJaxError(f"optim.rates has '{group}', a group of leaves that the method does not have: "
                               f"{nearest(group, groups)}")
        if not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
            raise PeftJaxError(f"optim.rates['{group}']={rate!r}: a factor of the learning rate, at least 0.")
    return {TRAINABLE: 1.0, **given}
