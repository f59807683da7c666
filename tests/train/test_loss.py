"""The chunked loss against the whole one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.parallel.mesh import feed, make_mesh
from peft_jax.planner.collectives import collectives
from peft_jax.train.loss import batch_loss, cross_entropy, pick, squared_error, summed_loss


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (3, 5, 8)), jax.random.normal(keys[1], (8, 11))
    target = jax.random.randint(keys[2], (3, 5), 0, 11)
    weight = jnp.where(jax.random.uniform(keys[3], (3, 5)) < 0.7, 1.5, 0.0)
    return hidden, head, target, weight


def whole(hidden, head, target, weight):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, target)
    return jnp.sum(losses * weight), weight.sum()


def chunked(hidden, head, target, weight, chunk, shards=1):
    return summed_loss(lambda states: states @ head, hidden, target, weight, chunk, shards=shards)


@pytest.mark.slow
@pytest.mark.parametrize("chunk, shards", [(1, 1), (4, 1), (15, 1), (1000, 1), (4, 3), (5, 3), (7, 2)])
def test_equals_the_whole(inputs, chunk, shards):
    """Three rows: three shards have one each, two would have to share one, which is no error."""
    np.testing.assert_allclose(chunked(*inputs, chunk, shards), whole(*inputs), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("chunk, shards, jit", [(4, 1, False), (15, 1, False), (4, 1, True), (15, 1, True),
                                                (4, 3, True)])
def test_gradients_of_states_and_of_a_trainable_head(inputs, chunk, shards, jit):
    def scaled(loss):  # an outer factor, so that the cotangent is not 1
        return lambda hidden, head: 3 * loss(hidden, head, *inputs[2:])[0]

    ours = jax.grad(scaled(lambda *x: chunked(*x, chunk, shards)), (0, 1))
    theirs = jax.grad(scaled(whole), (0, 1))
    for mine, expected in zip((jax.jit(ours) if jit else ours)(*inputs[:2]), theirs(*inputs[:2]), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


PAD = -1
IN_CHUNKS = {  # (chunk, shards) of 4 rows of 3 answers: which answers share a chunk, PAD for zeros at a shard's end
    (4, 1): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    (4, 2): [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],
    (3, 2): [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]],  # rounded up to whole shards
    (8, 2): [[0, 1, 2, 3, 6, 7, 8, 9], [4, 5, PAD, PAD, 10, 11, PAD, PAD]],
    (4, 4): [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]],
    (4, 3): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],  # four rows are not shared by three
    (1000, 2): [list(range(12))],
}


def neighbours(states):
    """A head that sees its chunk: it takes off the mean of the states that came with a state."""
    return states - states.mean(0)


def rows_of_answers():
    """(hidden (4, 3, 5), target, weight), of which one answer is missing."""
    keys = jax.random.split(jax.random.key(1), 2)
    weight = jnp.ones((4, 3)).at[1, 2].set(0)
    return jax.random.normal(keys[0], (4, 3, 5)), jax.random.randint(keys[1], (4, 3), 0, 5), weight


def loss_of_chunks(hidden, target, weight, members):
    """The sum over chunks of those members, one after another."""
    hidden = np.concatenate([np.asarray(hidden).reshape(12, 5), np.zeros((1, 5))])
    target, weight = (np.append(np.asarray(array).reshape(12), 0) for array in (target, weight))
    return sum(float(jnp.sum(cross_entropy(jnp.asarray(neighbours(hidden[chunk])), target[chunk]) * weight[chunk]))
               for chunk in map(np.array, members))


@pytest.mark.slow
@pytest.mark.parametrize("chunk, shards", IN_CHUNKS)
def test_every_chunk_has_as_much_of_every_shard(chunk, shards):
    hidden, target, weight = rows_of_answers()
    total, count = summed_loss(neighbours, hidden, target, weight, chunk, shards=shards)
    expected = loss_of_chunks(hidden, target, weight, IN_CHUNKS[chunk, shards])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert count == 11


def asked(table, target, weight):
    """A batch whose answers stand at the tokens 1, 0 and 3 of 4, and ``apply`` of a model that looks its states up."""
    ids = np.arange(16, dtype=np.int32).reshape(4, 4)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "positions": ids % 4,
             "loss_index": np.tile(np.array([1, 0, 3], np.int32), (4, 1)), "loss_target": np.asarray(target),
             "loss_weight": np.asarray(weight)}

    def apply(variables, x, method, positions=None, segment_ids=None, rngs=None):
        return variables["params"]["table"][x] if method == "hidden" else head(x, variables["params"])

    def head(states, params):
        return states @ params["kernel"] if "kernel" in params else neighbours(states)

    return apply, {"table": table}, batch


def test_a_model_of_ones_own_that_takes_no_lengths_is_told(inputs):
    apply, params, batch = asked(jnp.ones((16, 5)), np.zeros((4, 3), int), np.ones((4, 3), np.float32))
    del batch["segment_ids"]
    assert np.isfinite(batch_loss(apply, params, batch, chunk=4)[0])
    with pytest.raises(PeftJaxError, match=r"hidden does not take lengths=, int \(rows,\).*data\.collate=pack"):
        batch_loss(apply, params, batch | {"lengths": np.full(4, 3)}, chunk=4)


@pytest.mark.parametrize("sizes, shards", [((1, 1, 1), 1), ((2, 1, 1), 2), ((1, 2, 2), 2), ((2, 2, 1), 4)])
def test_a_batch_on_a_mesh_is_cut_into_its_shards(sizes, shards):
    hidden, target, weight = rows_of_answers()
    table = jax.random.normal(jax.random.key(2), (16, 5)).at[jnp.array([[1, 0, 3]]) + 4 * jnp.arange(4)[:, None]].set(
        hidden)
    apply, params, batch = asked(table, target, weight)
    mesh = make_mesh(*sizes)
    total, count = jax.jit(lambda batch: batch_loss(apply, params, batch, chunk=4, mesh=mesh))(feed(mesh, batch))
    np.testing.assert_allclose(total, loss_of_chunks(hidden, target, weight, IN_CHUNKS[4, shards]), rtol=1e-5)
    assert count == 11


def test_on_a_mesh_nothing_but_sums_travels():
    """No device asks for another's states or logits: only gradients, the loss and its weight are summed."""
    _, target, weight = rows_of_answers()
    apply, params, batch = asked(jax.random.normal(jax.random.key(2), (16, 5)), target, weight)
    params["kernel"] = jax.random.normal(jax.random.key(3), (5, 5))
    mesh = make_mesh(4, 1, 1)
    step = jax.jit(jax.grad(lambda params, batch: batch_loss(apply, params, batch, chunk=4, mesh=mesh)[0]))
    program = step.lower(params, feed(mesh, batch)).compile().as_text()
    assert {one.kind for one in collectives(program)} == {"all-reduce"}


@pytest.mark.slow
def test_errors_are_those_of_float32():
    """Of logits in bfloat16, whose own errors would be off by some thousandths."""
    hidden, target, weight = rows_of_answers()
    logits = hidden.astype(jnp.bfloat16)
    total, _ = summed_loss(lambda states: states, logits, target, weight, 1000)
    expected = jnp.sum(cross_entropy(logits.astype(jnp.float32), target) * weight)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.slow
def test_squared_errors_and_their_gradients(inputs):
    hidden, head, _, weight = inputs
    target = jnp.linspace(-1, 1, 15).reshape(3, 5)

    def ours(hidden, head):
        return 2 * summed_loss(lambda states: states @ head[:, :1], hidden, target, weight, 4, squared_error)[0]

    def theirs(hidden, head):
        return 2 * jnp.sum(((hidden @ head)[..., 0] - target) ** 2 * weight)

    np.testing.assert_allclose(ours(hidden, head), theirs(hidden, head), rtol=1e-5)
    for mine, expected in zip(jax.grad(ours, (0, 1))(hidden, head), jax.grad(theirs, (0, 1))(hidden, head)):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-4)


def test_no_chunk_ever_holds_all_logits():
    """The compiled program has no array of tokens x vocabulary, forward or backward."""
    tokens, vocab, chunk = 64, 1111, 16
    head, hidden = jnp.ones((8, vocab)), jnp.ones((1, tokens, 8))
    target, weight = jnp.zeros((1, tokens), int), jnp.ones((1, tokens))
    step = jax.jit(jax.grad(lambda x: chunked(x, head, target, weight, chunk)[0]))
    program = step.lower(hidden).compile().as_text()
    assert f"[{chunk},{vocab}]" in program
    assert f"[{tokens},{vocab}]" not in program and f"[1,{tokens},{vocab}]" not in program


@pytest.mark.slow
def test_pick():
    hidden = jnp.arange(12.0).reshape(1, 4, 3)
    np.testing.assert_array_equal(pick(hidden, jnp.array([[2, 0]])), [[[6, 7, 8], [0, 1, 2]]])
