"""Learning rates step by step and AdamW, against transformers' schedules and torch's optimiser."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax import flatten, partition
from peft_jax.errors import PeftJaxError
from peft_jax.train import optimizer
from peft_jax.train.optimizer import make_optimizer, make_schedule
from tests.methods.test_every_method import TRAINED, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

THEIRS = {
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}
OPTIM = {"learning_rate": 0.1, "schedule": "constant", "warmup_ratio": 0.0, "b1": 0.8, "b2": 0.9, "eps": 1e-2,
         "weight_decay": 0.0, "clip_norm": 0.0, "rates": None}


def schedule_of(steps, **options):
    settings = {**OPTIM, **options}
    return make_schedule(steps, **{name: settings[name] for name in ("learning_rate", "schedule", "warmup_ratio")})


def optimizer_of(steps, labels=None, **options):
    return make_optimizer(steps, labels, **{**OPTIM, **options})


def learning_rates(name, rate, steps, warmup):
    """(steps,) as transformers makes them: step s trains at the rate after s calls of its scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    scheduler, rates = THEIRS[name](optimizer, warmup, steps), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("steps, ratio, warmup", [
    (10, 0.0, 0), (10, 0.3, 3), (10, 0.31, 4), (7, 0.5, 4), (33, 0.03, 1), (34, 0.03, 2), (100, 0.07, 8), (1, 0.5, 0),
])
def test_every_step_has_the_learning_rate_of_transformers(name, steps, ratio, warmup):
    """Warm-up is rounded up, as there; 100 * 0.07 is a little over 7 in floating point, there too. In a run of one step
    there is none, which would train at 0."""
    assert warmup == math.ceil(steps * ratio) or steps == 1
    schedule = schedule_of(steps, schedule=name, learning_rate=0.2, warmup_ratio=ratio)
    found = [float(schedule(step)) for step in range(steps)]
    np.testing.assert_allclose(found, learning_rates(name, 0.2, steps, warmup), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", THEIRS)
def test_a_run_that_is_all_warm_up_reaches_the_rate_at_its_last_step(name):
    schedule = schedule_of(5, schedule=name, learning_rate=0.4, warmup_ratio=1.0)
    np.testing.assert_allclose([float(schedule(step)) for step in range(5)], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)


def test_an_unknown_schedule_names_the_nearest():
    with pytest.raises(PeftJaxError, match=r"schedule='cosin'.*cosine"):
        schedule_of(5, schedule="cosin")


STEPS = 6
RNG = np.random.default_rng(0)
SHAPES = {"lora_a": (3, 2), "lora_b": (2, 4), "lora_magnitude": (4,), "bias": (3,)}
START, *GRADIENTS = ({name: RNG.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(STEPS + 1))
WARM = {"schedule": "linear", "warmup_ratio": 0.3}


def ours(rates, **options):
    """The leaves after steps of fixed gradients; of two groups where there are rates."""
    labels = dict.fromkeys(SHAPES, "trainable") | {"lora_b": "fast", "kernel": "frozen"} if rates else None
    tx = optimizer_of(STEPS, labels, **WARM, rates=rates, vectors=("lora_magnitude",), **options)
    leaves = jax.tree.map(jnp.float32, START)
    state = tx.init(leaves)
    for gradient in GRADIENTS:
        updates, state = tx.update(jax.tree.map(jnp.float32, gradient), state, leaves)
        leaves = optax.apply_updates(leaves, updates)
    return leaves


def torch_s(rates, weight_decay, clip_norm, decay_vectors):
    """The same by torch's AdamW, with the warm-up of transformers."""
    rates = rates or {}
    factors = dict.fromkeys(SHAPES, rates.get("trainable", 1)) | {"lora_b": rates.get("fast", 1)}
    decays = {name: decay_vectors or name.startswith("lora_a") or name == "lora_b" for name in SHAPES}
    leaves = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in START.items()}
    groups = [{"params": [leaf], "lr": OPTIM["learning_rate"] * factors[name],
               "weight_decay": weight_decay * decays[name]} for name, leaf in leaves.items()]
    adam = torch.optim.AdamW(groups, betas=(OPTIM["b1"], OPTIM["b2"]), eps=OPTIM["eps"], weight_decay=weight_decay)
    scheduler = THEIRS["linear"](adam, math.ceil(STEPS * WARM["warmup_ratio"]), STEPS)
    for gradient in GRADIENTS:
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(leaves.values(), clip_norm or float("inf"))
        adam.step()
        scheduler.step()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


@pytest.mark.slow
@pytest.mark.parametrize("rates", [None, {"fast": 16.0}, {"trainable": 0.5, "fast": 2}])
@pytest.mark.parametrize("decay, clip, vectors", [(0.0, 0.0, False), (0.3, 0.7, False), (0.3, 100.0, True)])
def test_steps_are_those_of_torch(rates, decay, clip, vectors):
    """Moments, epsilon, weight decay, clipping before them, schedule and the groups' rates, in one comparison."""
    theirs = torch_s(rates, decay, clip, vectors)
    for name, leaf in ours(rates, weight_decay=decay, clip_norm=clip, decay_vectors=vectors).items():
        np.testing.assert_allclose(leaf, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_group_at_rate_nought_stands_still():
    leaves = ours({"fast": 0, "trainable": 1.0}, weight_decay=0.3)
    np.testing.assert_array_equal(leaves["lora_b"], START["lora_b"].astype(np.float32))
    assert (np.asarray(leaves["lora_a"]) != START["lora_a"].astype(np.float32)).all()


@pytest.mark.parametrize("rate", [-0.5, float("inf"), float("nan"), "fast"])
def test_a_rate_is_a_number_of_at_least_nought(rate):
    with pytest.raises(PeftJaxError, match=r"rates\['fast'\]=.*at least 0"):
        optimizer_of(3, {"lora_b": "fast"}, rates={"fast": rate})


@pytest.mark.parametrize("name", TRAINED)
def test_what_weight_decay_leaves_alone_is_what_has_one_axis(peer_bases, name):
    method, (_, _, base) = make(name), peer_bases["qwen2"]
    params = jax.eval_shape(method.init, jax.random.key(0), base)
    trainable, _ = partition(params, method.labels(params))
    assert flatten(optimizer._decays(method.vectors, trainable)) == {
        path: leaf.ndim - path.startswith("layers/") > 1 for path, leaf in flatten(trainable).items()}
