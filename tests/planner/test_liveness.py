"""What is alive at once, by hand: products that are added as they are made, and what waits while a loop runs."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from peft_jax import lora, quant
from peft_jax.planner import shapes, sum_of_parts
from peft_jax.planner.flops import flops
from peft_jax.planner.liveness import loops, peak
from peft_jax.train.loss import cross_entropy

SQUARE = jax.ShapeDtypeStruct((8, 8), jnp.float32)
EACH = 8 * 8 * 4


def two_terms(x, w, a, u):
    return ((x @ w + x @ a) * (x @ u)).sum()


def read_twice(x, w, a, u):
    first = x @ w
    return ((first + x @ a) * (x @ u) * first).sum()


@pytest.mark.parametrize("function, adds, most", [
    (two_terms, False, 3), (two_terms, True, 2),  # both terms and the third product; their sum and the third
    (read_twice, False, 3), (read_twice, True, 3)])  # a term that is read again cannot be added to, the other can
def test_a_gpu_adds_a_product_as_it_is_made(function, adds, most):
    traced = jax.make_jaxpr(function)(SQUARE, SQUARE, SQUARE, SQUARE).jaxpr
    assert peak(traced, adds=adds) == pytest.approx(most * EACH, abs=8)


def test_what_a_loop_finds_and_hands_on_does_not_wait_for_it():
    def run(x):
        early, late = jnp.cumsum(x), jnp.cumsum(x * 2)  # a running sum has to be there whole
        last, _ = jax.lax.scan(lambda c, _: (c + 1, None), early, None, 3)
        return last.sum() + late.sum()

    assert [waits for waits, _ in loops(run, jax.ShapeDtypeStruct((100,), jnp.float32))] == [400]


def test_a_loop_in_a_branch_is_found_and_a_result_in_another_shape_does_not_wait():
    def run(x):
        held, told = jnp.cumsum(x), jnp.cumsum(x * 2)
        last = jax.lax.cond(x[0] > 0, lambda c: jax.lax.scan(lambda c, _: (jnp.cumsum(c), None), c, None, 3)[0],
                            lambda c: c, x)
        return last.sum() + held.sum(), told.reshape(10, 10)

    (waits, most), = loops(run, jax.ShapeDtypeStruct((100,), jnp.float32))
    assert waits == 804 and most >= 400  # what is held, the branch's result, and which branch


@pytest.mark.slow
def test_on_a_gpu_less_is_alive_and_less_waits(tiny_model):
    given = shapes(tiny_model[0].clone(remat=True), lora(r=4, target_modules="all-linear"), optax.adamw(1e-4), 2, 64)
    here, there = ({part.name: part.bytes for part in sum_of_parts(one, 512, cross_entropy)}
                   for one in (given, given._replace(gpu=True)))
    assert not given.gpu
    fewer = {name for name in here if there[name] < here[name]}
    assert fewer == {"activations kept", "one layer, forward and back"} and here.keys() == there.keys()


def test_a_fused_product_is_planned_as_the_plain_one_that_it_may_be():
    """Its kernels, in branches for their platforms, keep what they make in a processor's own memory."""
    x, leaf = jax.ShapeDtypeStruct((16, 128), jnp.bfloat16), quant.quantize_array(jnp.ones((128, 64), jnp.bfloat16))
    found = []
    for product in ("plain", "fused"):
        one = dataclasses.replace(leaf, product=product)
        run = jax.value_and_grad(lambda x, one=one: quant.dot(x, one).astype(jnp.float32).sum())
        found.append((flops(run, x), peak(jax.make_jaxpr(run)(x).jaxpr)))
    (plain, bytes_plain), (fused, bytes_fused) = found
    assert plain == fused == 2 * 2 * 16 * 128 * 64
    assert bytes_plain <= bytes_fused <= bytes_plain + 4  # which platform it is, a number
