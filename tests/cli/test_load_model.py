"""What loading a model tells of its weights."""

import dataclasses

import jax.numpy as jnp

from peft_jax.cli.load_model import plain_products
from peft_jax.quant import quantize_array


def test_a_line_says_where_a_fused_product_is_the_plain_one():
    one = quantize_array(jnp.ones((64, 32)))
    stack = quantize_array(jnp.ones((3, 32, 64)), block_size=16, double_quant=True, stack=(3,), inputs=(32,),
                           outputs=(64,))
    fused = [dataclasses.replace(leaf, product="fused") for leaf in (one, stack)]
    assert plain_products({"q": {"kernel": one}, "norm": {"scale": jnp.ones(2)}}, jnp.float32) is None
    assert plain_products({"q": {"kernel": fused[0]}, "o": {"kernel": one}}, jnp.float32) == (
        "product='fused': plain for 1 of 1 weights here: there is no kernel for cpu")
    assert plain_products({"layers": {"kernel": fused[1]}, "q": {"kernel": fused[0]}}, jnp.float32) == (
        "product='fused': plain for 2 of 2 weights here, for one: its blocks are of 16 values, not of 32, 64, 128")
