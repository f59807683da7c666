"""The scaling alpha / r is exact in half precision: what is merged, in float32, has the same one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.methods.lora.batched import _row
from peft_jax.methods.lora.low_rank import branch
from peft_jax.methods.lycoris import lokr

SCALING = jnp.float32(0.3)  # bfloat16's nearest number is 0.13 % larger


def arrays(*shapes):
    return [jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes)]


def by_factors(x, first, second):
    return lokr.branch(x, {"lokr_w1": first, "lokr_w2": second}, SCALING)


PRODUCTS = {
    "lora": (lambda x, a, b: branch(x, a, b, SCALING), [(512, 64), (64, 8), (8, 48)], lambda a, b: a @ b),
    "mixed": (lambda x, a, b: _row(x, a, b, SCALING), [(512, 64), (64, 8), (8, 48)], lambda a, b: a @ b),
    "lokr": (by_factors, [(512, 64), (8, 6), (8, 8)], np.kron),
}


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS)
def test_a_branch_in_bfloat16_has_the_scaling_of_its_merged_kernel(product):
    make, shapes, whole = PRODUCTS[product]
    x, a, b = arrays(*shapes)
    exact = 0.3 * np.asarray(x, np.float64) @ whole(np.asarray(a, np.float64), np.asarray(b, np.float64))
    ours = np.asarray(make(x, a, b), np.float64)
    assert abs((ours * exact).sum() / (exact**2).sum() - 1) < 3e-4


def test_the_gradient_in_bfloat16_has_it_too():
    x, a, b, back = arrays((512, 64), (64, 8), (8, 48), (512, 48))
    _, gradients = jax.vjp(lambda *leaves: branch(*leaves, SCALING), x, a, b)
    one, a_, b_, g = (np.asarray(array, np.float64) for array in (x, a, b, back))
    exact = [0.3 * g @ b_.T @ a_.T, 0.3 * one.T @ g @ b_.T, 0.3 * a_.T @ one.T @ g]
    for ours, there in zip(gradients(back), exact):
        assert abs((np.asarray(ours, np.float64) * there).sum() / (there**2).sum() - 1) < 3e-4
