"""What every method promises, checked the same way for each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax import bind, combine, flatten, partition, unflatten
from peft_jax.train.step import init_state, make_step


def moved(method, params, seed=0, by=0.3):
    """``params`` with every trainable leaf moved at random, as if trained."""
    labels, rng = flatten(method.labels(params)), np.random.default_rng(seed)
    change = {path: leaf + by * rng.normal(size=leaf.shape).astype(np.float32)
              for path, leaf in flatten(params).items() if labels[path] != "frozen"}
    return combine(params, unflatten(change))


def batch_of(ids):
    """A batch as the training step takes it, a loss on every token but the first."""
    rows, length = ids.shape
    places = np.arange(length)[None, None].repeat(rows, 1)
    return {"input_ids": ids[None], "segment_ids": np.ones_like(ids)[None], "positions": places,
            "loss_index": places[..., :-1], "loss_target": ids[None, :, 1:],
            "loss_weight": np.ones((1, rows, length - 1), np.float32)}  # fmt: skip


def trained(method, model, params, ids, steps=3, rate=0.05):
    """``params`` after some steps of Adam."""
    trainable, frozen = partition(params, method.labels(params))
    tx = optax.adam(rate)
    step, state = make_step(bind(method, model), tx, 64), init_state(trainable, tx, jax.random.key(1))
    for _ in range(steps):
        state, _ = step(state, frozen, batch_of(ids))
    return combine(frozen, state.trainable)


def check_start_is_base(method, model, params, ids):
    """At the start the logits are the base model's, bit for bit."""
    tuned = method.init(jax.random.key(0), params)
    ours = jax.jit(bind(method, model))({"params": tuned}, ids)
    base = jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(base, np.float32))


def check_training(method, model, params, ids):
    """Frozen leaves stay bit for bit, every trainable leaf moves, and the loss of the batch falls."""
    before = method.init(jax.random.key(0), params)
    after = trained(method, model, before, ids)
    labels, old, new = (flatten(t) for t in (method.labels(before), before, after))
    for path in labels:
        same = np.array_equal(np.asarray(old[path], np.float32), np.asarray(new[path], np.float32))
        assert same == (labels[path] == "frozen"), path

    def loss(tuned):
        logits = bind(method, model)({"params": tuned}, ids[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), ids[:, 1:]).mean()

    assert loss(after) < loss(before)
    return after


def check_merge(method, model, params, ids, tolerance=1e-5):
    """Merged equals unmerged in float32 within ``tolerance``; in bfloat16 it is at most twice as far from that."""
    exact, merged = _both_ways(method, model, params, ids, jnp.float32)
    scale = np.abs(exact).max()
    assert np.abs(exact - merged).max() <= tolerance * scale
    rounded, merged = _both_ways(method, model, params, ids, jnp.bfloat16)
    assert np.abs(merged - exact).max() <= 2 * np.abs(rounded - exact).max() < 0.2 * scale


def _both_ways(method, model, params, ids, dtype):
    """Logits of moved parameters, unmerged and merged, with base and computation in ``dtype``."""
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    computing = model.clone(dtype=dtype, param_dtype=dtype)
    tuned = moved(method, method.init(jax.random.key(0), base))
    merged = method.merge(tuned)
    saved = {path for path, leaf in flatten(tuned).items() if leaf.dtype != dtype}  # trained as a whole: float32
    assert all(leaf.dtype == dtype or path in saved for path, leaf in flatten(merged).items())
    assert flatten(merged).keys() == flatten(base).keys()
    return (np.asarray(jax.jit(bind(method, computing))({"params": tuned}, ids), np.float32),
            np.asarray(jax.jit(computing.apply)({"params": merged}, ids), np.float32))


def check_remat(method, model, params, ids):
    """Under rematerialisation the same loss and, within rounding, the same trained leaves."""
    before = moved(method, method.init(jax.random.key(0), params))
    plain, again = (trained(method, m, before, ids, 2, 1e-2) for m in (model, model.clone(remat=True)))
    for path, leaf in flatten(plain).items():
        np.testing.assert_allclose(leaf, flatten(again)[path], rtol=2e-2, atol=2e-3, err_msg=path)
