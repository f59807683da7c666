"""The fused product on Hopper GPUs: in jax's interpreter of GPU kernels, and compiled for a card that is not here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from peft_jax import quant
from peft_jax.planner.target_device import h100
from peft_jax.quant import pallas_gpu
from peft_jax.quant.decode import matrices

INTERPRETER = getattr(mosaic_gpu, "InterpretGPUParams", None)
interpreted = pytest.mark.skipif(INTERPRETER is None, reason="jax interprets kernels of this kind since 0.11")


def leaf_of(kind="nf4", block=64, double=False, shape=(64, 64)):
    weight = jax.random.normal(jax.random.key(1), shape)
    return quant.quantize_array(weight, kind, block_size=block, double_quant=double)


def values_by_ones(leaf, over_columns, **tiles):
    """A leaf's matrix as its product with ones on the diagonal; or transposed."""
    x = jnp.eye(leaf.matrix[1 if over_columns else 0], dtype=jnp.bfloat16)
    tiles = pallas_gpu.tiles_of(leaf, len(x), over_columns)._replace(**tiles)
    return pallas_gpu.times(x, leaf, over_columns, tiles, INTERPRETER(detect_races=True))


@interpreted
@pytest.mark.parametrize("over_columns", [True, False])
def test_ones_bring_the_decoded_values_to_the_bit(over_columns):
    leaf = leaf_of("nf4", 32)
    weight = matrices(leaf, jnp.bfloat16)
    np.testing.assert_array_equal(values_by_ones(leaf, over_columns), weight.T if over_columns else weight)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("kind, block, double", [("nf4", 64, True), ("fp4", 128, False), ("int4", 32, True),
                                                 ("int4_affine", 32, False), ("int8", 32, False), ("int8", 128, True)])
def test_every_type_with_several_tiles_along_each_axis(kind, block, double):
    leaf = leaf_of(kind, block, double, (256, 128))
    weight = matrices(leaf, jnp.bfloat16)
    np.testing.assert_array_equal(values_by_ones(leaf, True, tokens=128, splits=2), weight.T)
    np.testing.assert_array_equal(values_by_ones(leaf, False, tokens=64, splits=1), weight)


@interpreted
@pytest.mark.slow
def test_rows_of_an_odd_number_of_tiles_and_tokens_that_fill_none():
    leaf = leaf_of("int4", 64, shape=(192, 64))  # 96 bytes a row: tiles of 32
    weight, x = matrices(leaf, jnp.bfloat16), jax.random.normal(jax.random.key(0), (11, 192)).astype(jnp.bfloat16)
    assert pallas_gpu.tiles_of(leaf, 11, True)[:2] == (16, 32)
    y, expected = pallas_gpu.times(x, leaf, True, interpret=INTERPRETER()), np.float32(x) @ np.float32(weight.T)
    np.testing.assert_allclose(np.float32(y), expected, rtol=2**-8, atol=192 * 2**-24 * 8 * np.abs(expected).max())


def test_tiles_leave_no_processor_idle_where_there_are_few_programs():
    leaf = jax.eval_shape(lambda: leaf_of(shape=(4096, 4096)))
    assert pallas_gpu.tiles_of(leaf, 1, True) == (8, 64, 8)  # 64 tiles of rows by 8
    assert pallas_gpu.tiles_of(leaf, 1, False) == (8, 64, 16)  # 32 of columns
    assert pallas_gpu.tiles_of(leaf, 4096, True) == (128, 64, 1)
    assert pallas_gpu.tiles_of(leaf_of(), 1, True).splits == 1  # one step


def test_what_a_gpu_has_no_kernel_for():
    wide = leaf_of(shape=(128, 64))
    assert pallas_gpu.unfit(wide, jnp.bfloat16) is None
    assert "are float32" in pallas_gpu.unfit(wide, jnp.float32)
    assert "48 x 128 values are no whole number" in pallas_gpu.unfit(leaf_of(shape=(128, 48)), jnp.bfloat16)
    assert "64 x 32 values" in pallas_gpu.unfit(leaf_of("int8", 32, shape=(32, 64)), jnp.bfloat16)
    for capability in ("8.0", "10.0", "gfx942"):
        assert f"and here it is {capability}" in pallas_gpu.unfit(wide, jnp.bfloat16, capability)


@pytest.mark.slow
@pytest.mark.parametrize("along", ["scan", "vmap", "vmap of x"])
def test_under_transformations_it_is_lowered_as_one(along):
    stack = quant.quantize_array(jnp.ones((3, 128, 64)), stack=(3,), inputs=(128,), outputs=(64,))
    stack = dataclasses.replace(stack, product="fused", plain_dtype="bfloat16")
    first = jax.tree.map(lambda array: array[0], stack)
    run = {"scan": lambda x: jax.lax.scan(lambda carry, entry: (carry, quant.dot(*entry)), 0, (x, stack))[1],
           "vmap": lambda x: jax.vmap(quant.dot)(x, stack),
           "vmap of x": lambda x: jax.vmap(lambda x: quant.dot(x, first))(x)}[along]
    gradient = jax.jit(jax.grad(lambda x: run(x).astype(jnp.float32).sum()))
    traced = gradient.trace(jnp.ones((3, 5, 128), jnp.bfloat16))
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") >= 1


@pytest.mark.slow
@pytest.mark.parametrize("over_columns", [True, False])
@pytest.mark.parametrize("tokens", [1, 4096])
def test_it_compiles_for_an_h100(tokens, over_columns):
    """To machine code. MOSAIC_GPU_DUMP_TO=FOLDER in the environment keeps the programs and ptxas' words on them, where
    the compilation cache does not have them yet."""
    if (target := h100()) is None:
        pytest.skip("jax's CUDA plugin is not installed, and it has the compiler")
    leaf = jax.eval_shape(lambda: leaf_of("nf4", 64, True, (4096, 14336)))
    x = jax.ShapeDtypeStruct((tokens, leaf.matrix[1 if over_columns else 0]), jnp.bfloat16)
    traced = jax.jit(lambda x, leaf: pallas_gpu.times(x, leaf, over_columns)).trace(target.place(x), target.place(leaf))
    assert "mosaic_gpu" in traced.lower().compile(compiler_options=target.options).as_text()
