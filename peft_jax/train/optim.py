"""The optimiser: clip over the trainable part, AdamW, warm-up and decay."""

import optax

from peft_jax.errors import PeftJaxError, nearest


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


def make_optimizer(optim, total_steps: int) -> optax.GradientTransformation:
    """AdamW for the trainable tree alone; moments take the leaves' dtype, so keep trainables in float32."""
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    return optax.chain(clip, optax.adamw(make_schedule(optim, total_steps), optim.b1, optim.b2, optim.eps,
                                         weight_decay=optim.weight_decay))
