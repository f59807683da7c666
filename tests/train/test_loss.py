"""The chunked loss against the whole one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax.train.loss import pick, squared_error, summed_loss


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


def chunked(hidden, head, target, weight, chunk):
    return summed_loss(lambda states: states @ head, hidden, target, weight, chunk)


@pytest.mark.parametrize("chunk", [1, 4, 15, 1000])
def test_equals_the_whole(inputs, chunk):
    np.testing.assert_allclose(chunked(*inputs, chunk), whole(*inputs), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("chunk", [4, 15])
def test_gradients_of_states_and_of_a_trainable_head(inputs, chunk, jit):
    def scaled(loss):  # an outer factor, so that the cotangent is not 1
        return lambda hidden, head: 3 * loss(hidden, head, *inputs[2:])[0]

    ours = jax.grad(scaled(lambda *x: chunked(*x, chunk)), (0, 1))
    theirs = jax.grad(scaled(whole), (0, 1))
    for mine, expected in zip((jax.jit(ours) if jit else ours)(*inputs[:2]), theirs(*inputs[:2]), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-5)


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


def test_pick():
    hidden = jnp.arange(12.0).reshape(1, 4, 3)
    np.testing.assert_array_equal(pick(hidden, jnp.array([[2, 0]])), [[[6, 7, 8], [0, 1, 2]]])
