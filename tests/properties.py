"""What every method promises, checked the same way for each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from peft_jax import bind, combine, flatten, generate, kernel_axes, partition, unflatten
from peft_jax.parallel import partitioning
from peft_jax.parallel.mesh import feed
from peft_jax.train.loss import batch_loss
from peft_jax.train.step import init_state, make_step, state_shardings


class Generals(nn.Module):
    """Kernels of several output and several input axes: ``split`` (6, 4, 5), ``out`` (4, 5, outputs)."""

    outputs: int = 3

    @nn.compact
    def __call__(self, x):
        """(2, 6, 7) -> (2, 7, outputs)."""
        split = nn.DenseGeneral((4, 5), axis=1, name="split")(x)
        return nn.DenseGeneral(self.outputs, axis=(-2, -1), name="out")(split)


def generals(outputs=3):
    """(model, input (2, 6, 7), params, their axes) of :class:`Generals`."""
    model, x = Generals(outputs), np.random.default_rng(0).normal(size=(2, 6, 7)).astype(np.float32)
    params = model.init(jax.random.key(0), x)["params"]
    return model, x, params, kernel_axes(model, params, x)


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


@partial(jax.jit, static_argnums=0)
def plain_logits(model, params, ids):
    """Logits of plain parameters; compiled once for each model, which bound methods are not."""
    return model.apply({"params": params}, ids)


def steps(method, model, params, ids, count=3, rate=0.05, mesh=None):
    """Some steps of Adam: (params after them, their losses before and after, the gradient of the first).

    On a ``mesh`` everything lies by the model's rules, and what comes back is whole again.
    """
    tx = optax.adam(rate)
    if mesh is not None:
        params = partitioning.put(params, partitioning.by_rules(params, mesh, model.sharding, method))
    trainable, frozen = partition(params, method.labels(params))
    where = state_shardings(trainable, tx, mesh) if mesh is not None else None
    step = make_step(bind(method, model, mesh), tx, 64, mesh=mesh, where=where)
    state, losses, gradient = init_state(trainable, tx, jax.random.key(1), where), [], None
    for _ in range(count):
        state, metrics = step(state, frozen, feed(mesh, batch_of(ids), axis=1))
        losses.append(float(metrics["loss"]))
        if gradient is None:
            gradient = jax.tree.map(lambda mean: np.asarray(mean) / 0.1, state.opt_state[0].mu)  # 1 - Adam's b1
    return jax.tree.map(np.asarray, combine(frozen, state.trainable)), losses, gradient


def trained(method, model, params, ids, count=3, rate=0.05):
    """``params`` after some steps of Adam."""
    return jax.tree.map(jnp.asarray, steps(method, model, params, ids, count, rate)[0])


def check_start_is_base(method, model, params, ids):
    """At the start the logits are the base model's, bit for bit."""
    tuned = method.init(jax.random.key(0), params)
    ours = jax.jit(bind(method, model))({"params": tuned}, ids)
    base = plain_logits(model, params, ids)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(base, np.float32))


def check_training(method, model, params, ids):
    """Frozen leaves stay bit for bit, every trainable leaf moves, and the loss of the batch falls."""
    before = method.init(jax.random.key(0), params)
    after, losses, _ = steps(method, model, before, ids, 4)
    check_moved(method, before, after)
    assert losses[-1] < losses[0]
    return jax.tree.map(jnp.asarray, after)


def check_moved(method, before, after):
    """Frozen leaves are the same bit for bit, every trainable leaf is not."""
    labels, old, new = (flatten(t) for t in (method.labels(before), before, after))
    for path in labels:
        same = all(map(np.array_equal, jax.tree.leaves(old[path]), jax.tree.leaves(new[path])))
        assert same == (labels[path] == "frozen"), path


def check_merge(method, model, params, ids, tolerance=1e-5):
    """Merged equals unmerged in float32 within ``tolerance``; in bfloat16 it is at most twice as far from that."""
    exact, merged = both_ways(method, model, params, ids, jnp.float32)
    scale = np.abs(exact).max()
    assert np.abs(exact - merged).max() <= tolerance * scale
    check_merge_in_half_precision(method, model, params, ids, exact)


def check_merge_in_half_precision(method, model, params, ids, exact):
    """Merged in bfloat16 is at most twice as far from ``exact``, the float32 logits of the same moved leaves."""
    rounded, merged = both_ways(method, model, params, ids, jnp.bfloat16)
    assert np.abs(merged - exact).max() <= 2 * np.abs(rounded - exact).max() < 0.2 * np.abs(exact).max()


def both_ways(method, model, params, ids, dtype):
    """Logits of moved parameters, unmerged and merged, with base and computation in ``dtype``."""
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    computing = model.clone(dtype=dtype, param_dtype=dtype)
    tuned = moved(method, method.init(jax.random.key(0), base))
    merged = method.merge(tuned)
    saved = {path for path, leaf in flatten(tuned).items() if leaf.dtype != dtype}  # trained as a whole: float32
    assert all(leaf.dtype == dtype or path in saved for path, leaf in flatten(merged).items())
    assert flatten(merged).keys() == flatten(base).keys()
    return (np.asarray(jax.jit(bind(method, computing))({"params": tuned}, ids), np.float32),
            np.asarray(plain_logits(computing, merged, ids), np.float32))


def check_remat(method, model, params, ids):
    """Under rematerialisation the same loss and the same gradient of every trained leaf, within rounding."""
    tuned = moved(method, method.init(jax.random.key(0), params))
    trainable, frozen = partition(tuned, method.labels(tuned))
    batch = {name: array[0] for name, array in batch_of(ids).items()}

    def found(computing):
        def loss(leaves):
            return batch_loss(bind(method, computing), combine(frozen, leaves), batch, chunk=64)[0]

        return jax.jit(jax.value_and_grad(loss))(trainable)

    (plain, gradient), (again, other) = found(model), found(model.clone(remat=True))
    np.testing.assert_allclose(plain, again, rtol=1e-5)
    for path, leaf in flatten(gradient).items():
        np.testing.assert_allclose(flatten(other)[path], leaf, rtol=1e-3, atol=1e-4 * np.abs(leaf).max(), err_msg=path)


def check_packing(method, model, params, ids):
    """Two sequences packed into one row have the hidden states and the loss that each has in a row of its own."""
    tuned, width = moved(method, method.init(jax.random.key(0), params)), ids.shape[1]
    short = width - 3
    alone = jax.tree.map(lambda leaf: leaf[0], batch_of(ids[:2]))
    alone["segment_ids"][1, short:] = 0
    alone["loss_weight"][1, short - 1:] = 0
    ends = slice(0, 2 * width - 3)  # and three tokens of padding at the end
    packed = {name: leaf.reshape(1, -1) for name, leaf in alone.items()}
    packed["segment_ids"] = packed["segment_ids"] * np.repeat([1, 2], width)[None]
    packed["loss_index"] = packed["loss_index"] + np.repeat([0, width], width - 1)[None]
    apply = bind(method, model)

    @jax.jit
    def look(batch):
        found = [apply({"params": tuned}, batch["input_ids"], segment_ids=batch["segment_ids"], positions=positions,
                       method="hidden") for positions in (batch["positions"], None)]
        return *found, batch_loss(apply, tuned, batch, chunk=64)

    one, counted, loss = look(packed)
    each, _, loss_each = look(alone)
    for states in (one, counted):
        np.testing.assert_allclose(states[0, ends], each.reshape(2 * width, -1)[ends], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss[0], loss_each[0], rtol=1e-5)
    assert loss[1] == loss_each[1] == 2 * width - 5


def check_decoding(method, model, params, ids, new=6):
    """Greedy decoding, prompts padded on the left, is that of full forward passes over each row without padding; and a
    cache filled in pieces gives the logits of one pass."""
    tuned, apply = moved(method, method.init(jax.random.key(0), params)), bind(method, model)
    batch, width = ids.shape
    lengths = np.array([width, *[3] * (batch - 1)])
    left, mask = np.zeros_like(ids), np.arange(width)[None] >= width - lengths[:, None]
    rows = np.pad(ids, ((0, 0), (0, new)))
    for row, length in enumerate(lengths):
        left[row, width - length:] = ids[row, :length]
    tokens = generate(apply, model, tuned, left, mask.astype(int), max_new_tokens=new,
                      stop_ids=(model.config.vocab_size,))
    for row, length in enumerate(lengths):
        rows[row, length:length + new] = tokens[row]
    # One pass over what was decoded: each token is the best one behind those before it, so the first that is not shows.
    ends = np.concatenate([lengths + new, np.full(batch, width)])
    both = np.concatenate([rows, np.pad(ids, ((0, 0), (0, new)))])
    whole = jax.jit(bind(method, model))({"params": tuned}, both, np.arange(width + new)[None] < ends[:, None])
    whole, logits_of_ids = np.asarray(whole[:batch]), np.asarray(whole[batch:, :width])
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(tokens[row], whole[row, length - 1:length + new - 1].argmax(-1))

    @jax.jit
    def in_pieces(ids, places):
        cache, parts = apply({"params": tuned}, batch, width, method="init_cache"), []
        for piece in (slice(0, width // 2), slice(width // 2, width)):
            logits, held = apply({"params": tuned, "cache": cache}, ids[:, piece], positions=places[:, piece],
                                 mutable=["cache"])
            cache = held["cache"]
            parts.append(logits)
        return jnp.concatenate(parts, axis=1)

    places = np.arange(width)[None].repeat(batch, 0)
    np.testing.assert_allclose(in_pieces(ids, places), logits_of_ids, atol=1e-4 * np.abs(logits_of_ids).max())
