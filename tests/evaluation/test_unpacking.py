"""A quantised base made plain before text is written: the same numbers, on a mesh too, where they fit the memory."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax import (
    PeftJaxError,
    bind,
    chain,
    dequantize,
    dora,
    generate,
    lora,
    make_mesh,
    place,
    prefix,
    prompt,
    quantize,
)
from peft_jax.core import tree
from peft_jax.evaluation.unpacking import choose, unpacked
from peft_jax.quant import is_leaf
from peft_jax.train.memory import free_memory
from tests import properties

PROMPTS = np.array([[0, 5, 6, 7], [9, 8, 7, 6]]), np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
NEW = {"max_new_tokens": 8, "stop_ids": (319,)}
EMBEDDED = ("q_proj", "down_proj", "embed_tokens")  # the head is tied to the last
# (method, what becomes of its quantised leaves, such as a GGUF file would hold)
CASES = {
    "nf4": (chain(quantize("nf4", 16, double_quant=True), lora(r=4)), {}),
    "Q8_0, embedding": (chain(quantize("int8", 16, target_modules=EMBEDDED), lora(r=4)), {"scales": jnp.float16}),
    "Q4_1": (chain(quantize("int4_affine", 16), lora(r=4)), {"scales": jnp.float16, "offsets": jnp.float16}),
    "dora": (chain(quantize("nf4", 16), dora(r=4)), {}),
    "prompt": (chain(quantize("fp4", None), prompt(3)), {}),
    "prefix": (chain(quantize("int4", 16), prefix(3)), {}),
}


def cast(params, dtypes):
    """Quantised leaves with parts of other types."""
    def of(path, leaf):
        parts = {name: getattr(leaf, name).astype(dtype) for name, dtype in dtypes.items()} if is_leaf(leaf) else {}
        return replace(leaf, **parts) if parts else leaf

    return tree.map_paths(of, params)


def adapted(name, base):
    """(method, params) of a moved adapter on a quantised base."""
    method, dtypes = CASES[name]
    return method, properties.moved(method, cast(method.init(jax.random.key(0), base), dtypes), seed=1, by=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_plain_weights_write_what_packed_ones_do(name, tiny_model):
    model, base = tiny_model
    method, params = adapted(name, base)
    apply = bind(method, model)
    tokens = [generate(apply, model, params, *PROMPTS, **NEW, dequantize=how) for how in ("always", "never")]
    np.testing.assert_array_equal(*tokens)
    assert not np.array_equal(tokens[0], generate(model.apply, model, base, *PROMPTS, **NEW))  # as the adapter moved


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nf4", "Q8_0, embedding", "dora"])
def test_plain_weights_are_those_that_a_product_would_decode(name, tiny_model):
    """In the type that is computed in, to the bit; so logits differ by the order of sums alone."""
    model, base = tiny_model[0].clone(dtype=jnp.bfloat16), tiny_model[1]
    method, params = adapted(name, base)
    plain, apply = unpacked(model, params), jax.jit(bind(method, model))
    for path, leaf in tree.flatten(params).items():
        found = tree.flatten(plain)[path]
        if is_leaf(leaf):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(dequantize(leaf, jnp.bfloat16)), strict=True)
        else:
            assert found is leaf
    logits, want = (np.asarray(apply({"params": one}, PROMPTS[0]), np.float32) for one in (plain, params))
    assert np.abs(logits - want).max() <= 2**-8 * np.abs(want).max()


@pytest.mark.slow
def test_on_a_mesh_plain_weights_lie_as_plain_ones_would(tiny_model):
    model, base = tiny_model
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    method = chain(quantize("nf4", 16, double_quant=True), lora(r=4))
    params = properties.moved(method, method.init(jax.random.key(0), base), seed=1, by=0.5)
    placed = place(method, model, params, mesh)
    plain, whole = unpacked(model, placed, mesh), unpacked(model, params)
    for path, leaf in tree.flatten(place(None, model, base, mesh)).items():
        found = tree.flatten(plain)[path]
        assert found.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
        np.testing.assert_array_equal(np.asarray(found), np.asarray(tree.flatten(whole)[path]))
    tokens = [generate(bind(method, model, mesh), model, placed, *PROMPTS, **NEW, mesh=mesh, dequantize=how)
              for how in ("always", "never")]
    np.testing.assert_array_equal(*tokens)


def of_width(width, product="plain"):
    """The shapes of a quantised weight of two layers."""
    method = quantize("nf4", product=product, target_modules=("up_proj",))
    shape = jax.ShapeDtypeStruct((2, width, width), jnp.float32)
    return jax.eval_shape(method.init, jax.random.key(0), {"layers": {"up_proj": {"kernel": shape}}})


def test_weights_stay_packed_where_plain_ones_do_not_fit(tiny_model):
    model, base = tiny_model
    assert choose("auto", model, of_width(64)).dequantize == "always"
    chosen = choose("auto", model, of_width(2**20))
    assert chosen.dequantize == "never" and "packed weights: plain it takes 8796.1 GB, " in chosen.words
    assert "GB are free" in chosen.words
    half = choose("auto", model.clone(dtype=jnp.bfloat16), of_width(2**20))
    assert "plain it takes 13194.1 GB" in half.words  # and float32 copies
    assert choose("always", model, of_width(2**20)).dequantize == "always"
    assert choose("never", model, of_width(64)).words == "text is written with packed weights: dequantize=never"
    assert choose("auto", model, base) == ("auto", "")


def test_a_fused_product_stays_one(tiny_model):
    chosen = choose("auto", tiny_model[0], of_width(64, "fused"))
    assert chosen == ("never", "text is written with packed weights: its product is fused")


def test_other_words_are_errors(tiny_model):
    model, base = tiny_model
    with pytest.raises(PeftJaxError, match="dequantize='alway': did you mean always"):
        generate(model.apply, model, base, *PROMPTS, **NEW, dequantize="alway")


@pytest.mark.slow
def test_free_memory_is_some_of_the_machines():
    assert 0 < free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
