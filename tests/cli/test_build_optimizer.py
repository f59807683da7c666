"""The section ``config.optim`` reaches the optimiser whole, and its defaults are the library's."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.base import get_config
from peft_jax.cli.build_optimizer import build_optimizer, build_schedule
from peft_jax.train.optimizer import make_optimizer

LABELS = {"lora_a": "trainable", "lora_b": "lora_b"}
RATES = {"lora_b": 2.0}


def third_update(**options):
    """The optimiser's third update, of gradients that differ from step to step."""
    optim = get_config().optim
    optim.update({"rates": RATES, **options})
    tx, leaves = build_optimizer(optim, 10, LABELS), {"lora_a": jnp.ones(2), "lora_b": jnp.ones(2)}
    state = tx.init(leaves)
    for size in (1e-3, 3.0, 0.5):
        updates, state = tx.update({"lora_a": jnp.full(2, size), "lora_b": jnp.full(2, -size)}, state, leaves)
    return np.concatenate(jax.tree.leaves(updates))


@pytest.fixture(scope="module")
def usual():
    return third_update()


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"learning_rate": 1e-2}, {"schedule": "linear"}, {"warmup_ratio": 0.5}, {"b1": 0.5}, {"b2": 0.9}, {"eps": 0.1},
    {"weight_decay": 0.1}, {"clip_norm": 0.0}, {"rates": {"lora_b": 3.0}}], ids=lambda options: next(iter(options)))
def test_every_key_changes_what_a_step_does(usual, options):
    assert np.abs(third_update(**options) / usual - 1).max() > 1e-3


def test_defaults_are_those_of_the_library():
    optim = get_config().optim
    defaults = {name: one.default for name, one in inspect.signature(make_optimizer).parameters.items()
                if one.kind is one.KEYWORD_ONLY and one.default is not one.empty}
    assert (defaults.pop("vectors"), defaults.pop("around")) == ((), None)  # the method's, of which a run has no key
    assert defaults == {name: optim[name] for name in defaults} and len(defaults) == 9


def test_the_schedule_is_the_optimiser_s():
    optim = get_config().optim
    optim.update({"learning_rate": 0.5, "schedule": "linear", "warmup_ratio": 0.2})
    assert [float(build_schedule(optim, 10)(step)) for step in (0, 1, 2, 10)] == [0.0, 0.25, 0.5, 0.0]
