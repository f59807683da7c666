"""Houlsby adapters: the source article's count from the arrays. More: test_bottleneck.py."""

import jax
import jax.numpy as jnp
import pytest

import peft_jax
from peft_jax import flatten, houlsby


@pytest.mark.parametrize("width, narrow, each", [(4096, 64, 528_448), (576, 64, 74_368)])
def test_counts_are_the_closed_form(width, narrow, each):
    """2 h b + b + h in each module: of hidden 4096 and bottleneck 64 the source prints 528,128, its formula 524,416."""
    assert each == 2 * width * narrow + narrow + width
    base = {"layers": {"self_attn": {"o_proj": {"kernel": jax.ShapeDtypeStruct((3, width, width), jnp.bfloat16)}},
                       "mlp": {"down_proj": {"kernel": jax.ShapeDtypeStruct((3, 4 * width, width), jnp.bfloat16)}}}}
    method = houlsby(bottleneck_size=narrow)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), base)
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == 3 * 2 * each
    one = {path: leaf.size // 3 for path, leaf in flatten(params).items() if path.startswith("layers/mlp/adapter_")}
    assert sum(one.values()) - 1 == each  # the switch, which is frozen
