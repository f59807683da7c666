"""The fused product: a TPU's kernel in Pallas' interpreter, and both as far as programs go without a device."""

import dataclasses
import re
import sys
import warnings
from inspect import signature

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import quant
from peft_jax.quant import pallas, pallas_tpu
from peft_jax.quant.decode import matrices

IN, OUT = 256, 96
# Every type, every block size with one of each kind, and scales quantised again.
CODECS = [("nf4", 64, True), ("nf4", 128, False), ("fp4", 32, False), ("int4", 64, True), ("int4_affine", 32, False),
          ("int8", 32, False), ("int8", 128, True)]
SMALL = pallas_tpu.Tiles(16, 32, 64)  # several along each axis


def leaf_of(kind="nf4", block=64, double=False, shape=(IN, OUT), product="plain", dtype=jnp.float32, **options):
    weight = jax.random.normal(jax.random.key(1), shape).astype(dtype)
    found = quant.quantize_array(weight, kind, block_size=block, double_quant=double, **options)
    return dataclasses.replace(found, product=product)


def rows(tokens, width, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), (tokens, width)).astype(dtype)


def product(leaf, name):
    return dataclasses.replace(leaf, product=name)


def close(found, x, weight):
    """Any order of summing n products in float32 errs by at most n 2^-24 times the sum of their magnitudes (to first
    order); then one rounding to the result's type.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    exact, rounding = x @ weight, {"float32": 2**-24, "bfloat16": 2**-8}[found.dtype.name]
    allowed = 1.01 * len(weight) * 2**-24 * (np.abs(x) @ np.abs(weight)) + rounding * np.abs(exact) + 1e-30
    assert found.shape == exact.shape
    assert (np.abs(np.asarray(found, np.float64) - exact) <= allowed).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind, block, double", CODECS)
def test_ones_bring_the_decoded_values_to_the_bit(kind, block, double):
    leaf = leaf_of(kind, block, double)
    weight, width = np.asarray(matrices(leaf, jnp.float32)), max(64, block if kind == "int8" else 0)
    tiles = SMALL._replace(columns=width)
    np.testing.assert_array_equal(pallas_tpu.times(jnp.eye(IN), leaf, True, tiles, True), weight.T)
    np.testing.assert_array_equal(pallas_tpu.times(jnp.eye(OUT), leaf, False, tiles, True), weight)


@pytest.mark.slow
@pytest.mark.parametrize("tokens, dtype", [(1, jnp.float32), (37, jnp.bfloat16)])
def test_values_with_the_tiles_of_a_tpu(tokens, dtype):
    leaf = leaf_of("int4", double=True)
    weight, tiles = matrices(leaf, jnp.float32).astype(dtype), pallas_tpu.tiles_of(leaf, tokens)
    x, g = rows(tokens, IN, dtype), rows(tokens, OUT, dtype)
    close(pallas_tpu.times(x, leaf, True, tiles, True), x, weight.T)
    close(pallas_tpu.times(g, leaf, False, tiles, True), g, weight)


def test_scales_and_offsets_of_files(scales=jnp.float16):
    leaf = leaf_of("int4_affine", 32)
    leaf = dataclasses.replace(leaf, scales=leaf.scales.astype(scales), offsets=leaf.offsets.astype(scales))
    found = pallas_tpu.times(jnp.eye(IN), leaf, True, SMALL, True)
    np.testing.assert_array_equal(found, matrices(leaf, jnp.float32).T)


def test_gradient_of_dot():
    leaf, x, g = leaf_of("int8"), rows(37, IN), rows(37, OUT)
    y, pull = jax.vjp(jax.jit(lambda x: quant.dot(x, product(leaf, "interpreted"), x.dtype)), x)
    close(y, x, matrices(leaf, jnp.float32).T)
    close(pull(g)[0], g, matrices(leaf, jnp.float32))


@pytest.mark.slow
def test_dense_general_and_embeddings():
    heads = leaf_of("int8", shape=(2, 64, 4, 24), inputs=(2, 64), outputs=(4, 24), product="interpreted")
    x = rows(10, 128).reshape(5, 2, 2, 64)
    np.testing.assert_allclose(quant.dot(x, heads), quant.dot(x, product(heads, "plain")), rtol=0, atol=1e-4)
    for by_rows in (True, False):
        table = leaf_of("int4", block=32, shape=(64, 64), by_rows=by_rows, product="interpreted")
        x = rows(3, 64)
        np.testing.assert_allclose(quant.attend(x, table), quant.attend(x, product(table, "plain")), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("along", ["scan", "vmap", "vmap of x"])
def test_under_transformations(along):
    stack = quant.quantize_array(rows(3 * IN, OUT).reshape(3, IN, OUT), "int8", double_quant=True)
    stack, first = product(stack, "interpreted"), jax.tree.map(lambda array: array[0], stack)
    x, g = rows(3 * 5, IN, seed=2).reshape(3, 5, IN), rows(3 * 5, OUT, seed=3).reshape(3, 5, OUT)
    run = {"scan": lambda x: jax.lax.scan(lambda carry, entry: (carry, quant.dot(*entry)), 0, (x, stack))[1],
           "vmap": lambda x: jax.vmap(quant.dot)(x, stack),
           "vmap of x": lambda x: jax.vmap(lambda x: quant.dot(x, product(first, "interpreted")))(x)}[along]
    y, pull = jax.vjp(jax.jit(run), x)
    dx, weights = pull(g)[0], matrices(stack, jnp.float32)
    for i in range(3):
        weight = weights[0 if along == "vmap of x" else i]
        close(y[i], x[i], weight.T)
        close(dx[i], g[i], weight)


@pytest.mark.slow
def test_bind_reads_it():
    model, x, found = nn.Dense(32, name="up_proj"), rows(5, 64), {}
    params = {"kernel": rows(64, 32, seed=1), "bias": jnp.ones(32)}
    for name in ("interpreted", "plain"):
        method = peft_jax.chain(peft_jax.quantize("int8", 32, product=name),
                                peft_jax.lora(r=2, target_modules="all-linear", init_lora_weights=False))
        held, apply = method.init(jax.random.key(0), params), peft_jax.bind(method, model)
        run = jax.jit(lambda x, held=held, apply=apply: apply({"params": held}, x))
        assert ("pallas_call" in str(run.trace(x).jaxpr)) == (name == "interpreted")
        found[name] = run(x)
    np.testing.assert_allclose(found["interpreted"], found["plain"], rtol=0, atol=1e-4)  # sums of 64, of values to 40


UNFIT = {
    "of 16 values": (leaf_of(block=16), jnp.float32),
    "whole rows": (leaf_of("int8", None), jnp.float32),
    "no whole number": (leaf_of(shape=(80, 32)), jnp.float32),
    "float16": (leaf_of(), jnp.float16),
}


@pytest.mark.parametrize("why", UNFIT)
def test_without_a_kernel_the_product_is_the_plain_one(why):
    leaf, dtype = UNFIT[why]
    assert why in pallas.unfit(leaf, dtype)
    x = rows(5, leaf.shape[0], dtype)
    np.testing.assert_array_equal(quant.dot(x, product(leaf, "interpreted"), x.dtype), quant.dot(x, leaf, x.dtype))


def test_on_a_cpu_fused_is_plain_and_no_tokens_are_no_error():
    leaf, x = leaf_of(), rows(5, IN)
    np.testing.assert_array_equal(quant.dot(x, product(leaf, "fused"), x.dtype), quant.dot(x, leaf, x.dtype))
    assert quant.dot(x[:0], product(leaf, "interpreted")).shape == (0, OUT)


PLATFORM = {"platform": "gpu"} if "platform" in signature(jax.sharding.AbstractDevice).parameters else {}
H100 = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Explicit,), abstract_device=(
    jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, **PLATFORM)))
CALLS = {"cuda": "@mosaic_gpu", "tpu": "@tpu_custom_call"}


def lowered(leaf, platform, dtype, tokens=37):
    """A forward and a backward product as StableHLO for a platform that is not here."""
    def both(x, g, leaf):
        y, pull = jax.vjp(lambda x: quant.dot(x, leaf, x.dtype), x)
        return y, pull(g)

    x, g = (jax.ShapeDtypeStruct((tokens, width), dtype) for width in leaf.shape)
    with jax.sharding.use_abstract_mesh(H100), warnings.catch_warnings():
        warnings.simplefilter("error")  # jax says of a part that it will take away when a program is lowered
        return jax.jit(both).trace(x, g, leaf).lower(lowering_platforms=(platform,)).as_text()


def decoded(text, leaf):
    """Arrays in a program that are as large as the weight, in a floating dtype."""
    shapes = re.findall(r"tensor<([\dx]+)x(?:f32|bf16)>", text)
    return [shape for shape in shapes if np.prod([int(one) for one in shape.split("x")]) >= leaf.size]


@pytest.mark.slow
@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("kind, block, double", CODECS)
def test_both_products_lower_and_hold_no_decoded_weight(kind, block, double, platform):
    shape, dtype = (1024, 1536), jnp.float32 if block == 32 and platform == "tpu" else jnp.bfloat16
    leaf = jax.eval_shape(lambda: leaf_of(kind, block, double, shape, "fused"))
    text = lowered(leaf, platform, dtype)
    assert text.count(CALLS[platform]) == 2 and not decoded(text, leaf)


def test_plain_programs_hold_the_decoded_weight():
    leaf = jax.eval_shape(lambda: leaf_of(shape=(1024, 1536)))
    assert decoded(lowered(leaf, "cuda", jnp.bfloat16), leaf)


@pytest.mark.slow
def test_what_a_platform_has_no_kernel_for_is_plain_there():
    narrow = jax.eval_shape(lambda: leaf_of(shape=(256, 24), product="fused"))
    wide = jax.eval_shape(lambda: leaf_of(shape=(256, 1088), product="fused"))
    assert CALLS["cuda"] not in lowered(narrow, "cuda", jnp.bfloat16)
    assert CALLS["tpu"] in lowered(narrow, "tpu", jnp.bfloat16)
    assert CALLS["cuda"] in lowered(wide, "cuda", jnp.bfloat16)
    assert CALLS["cuda"] not in lowered(wide, "cuda", jnp.float32)
    assert CALLS["tpu"] not in lowered(wide, "tpu", jnp.bfloat16)
    assert decoded(lowered(wide, "rocm", jnp.bfloat16), wide)


def test_why_plain():
    leaf = leaf_of(shape=(1024, 1088))
    assert pallas.why_plain(leaf, jnp.float16) == "activations are float16, not bfloat16 or float32"
    assert pallas.why_plain(leaf, jnp.float32) == "there is no kernel for cpu"
    assert pallas.why_plain(leaf, jnp.float32, "tpu") == "no tile divides its 1088 x 1024"
    assert pallas.why_plain(leaf, jnp.bfloat16, "gpu") is None
    assert "for bfloat16" in pallas.why_plain(leaf, jnp.float32, "gpu")


def test_the_setting():
    params = {"q": {"kernel": rows(64, 32)}}
    with pytest.raises(peft_jax.PeftJaxError, match="product='fuse': did you mean fused"):
        peft_jax.quantize(product="fuse")
    assert peft_jax.quantize().init(None, params)["q"]["kernel"].product == "plain"
    held = peft_jax.quantize(product="fused").init(None, params)
    assert held["q"]["kernel"].product == "fused"
    assert peft_jax.quantize().init(None, held)["q"]["kernel"].product == "plain"


def test_a_wrong_or_failing_product_is_told_and_not_timed():
    from benchmarks import quant_kernel

    def broken():
        raise RuntimeError("ptxas | exit code 1\nand more")

    ones = [jnp.ones((2, 2))]
    assert quant_kernel.wrong({"plain": lambda: ones, "fused": lambda: ones}) == ""
    assert quant_kernel.wrong({"plain": lambda: ones, "fused": broken}) == "FAILED: ptxas / exit code 1"
    for one in (1.1, float("nan")):
        told = quant_kernel.wrong({"plain": lambda: ones, "fused": lambda: [one * ones[0]]})  # noqa: B023
        assert told.startswith("WRONG: off by ")


@pytest.mark.slow
def test_the_benchmark_runs_and_asks_for_a_gpu(monkeypatch, capsys):
    from benchmarks import quant_kernel

    monkeypatch.setattr(sys, "argv", ["quant_kernel.py", "--interpret", "--small", "--rounds=1", "--quant_type=int4"])
    quant_kernel.main()
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in table if line.startswith("| 1 ")] == ["y", "dx"]
    monkeypatch.setattr(sys, "argv", ["quant_kernel.py"])
    with pytest.raises(SystemExit, match="no GPU here"):
        quant_kernel.main()
