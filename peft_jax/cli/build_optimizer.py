"""From the section ``config.optim`` to the optimiser and its schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from peft_jax.core import tree
from peft_jax.train.optimizer import make_optimizer, make_schedule


def build_schedule(optim, total_steps: int) -> optax.Schedule:
    """The learning rate of each step, as ``config.optim`` says."""
    return make_schedule(total_steps, **_rate(optim))


def build_optimizer(optim, total_steps: int, labels: tree.Tree | None = None,
                    vectors: Sequence[str] = (), around: Callable[[Any, int], Any] | None = None,
                    ) -> optax.GradientTransformation:
    """The optimiser of ``config.optim`` for a method's ``labels``, ``vectors`` and its ``optimizer``, which goes
    ``around``. Raises as ``make_optimizer``."""
    return make_optimizer(total_steps, labels, **_rate(optim), b1=optim.b1, b2=optim.b2, eps=optim.eps,
                          weight_decay=optim.weight_decay, clip_norm=optim.clip_norm, rates=optim.rates,
                          decay_vectors=optim.decay_vectors, vectors=vectors, around=around)


def _rate(optim) -> dict[str, Any]:
    return {"learning_rate": optim.learning_rate, "schedule": optim.schedule, "warmup_ratio": optim.warmup_ratio}
