"""What quantising keeps: bytes, error, shapes, under every way of calling it; and what it refuses."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax import PeftJaxError, QuantizedArray, count, dequantize, nbytes, quantize_array
from peft_jax.quant.codebooks import QUANT_TYPES

NORMAL = np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int4_affine": 4, "int8": 8}


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", [32, 64, 128, None])
def test_bits_per_parameter_counted_from_buffers(quant_type, block_size):
    each = 32 / (block_size or 1024) * (2 if quant_type == "int4_affine" else 1)
    leaf = quantize_array(NORMAL, quant_type, block_size=block_size)
    assert 8 * sum(np.asarray(child).nbytes for child in jax.tree.leaves(leaf)) == (BITS[quant_type] + each) * 2**20
    assert leaf.nbytes == nbytes({"kernel": leaf}) and count({"kernel": leaf}) == leaf.size == 2**20


def test_double_quantisation_takes_4_127_bits():
    """4 + 8 / 64 + 32 / (64 * 256), and the mean."""
    leaf = quantize_array(NORMAL, double_quant=True)
    assert 8 * leaf.nbytes / leaf.size == pytest.approx(4.127, abs=5e-4)
    assert 8 * leaf.nbytes == (4 + 8 / 64 + 32 / 64 / 256) * 2**20 + 32


@pytest.mark.parametrize("quant_type, expected", [("nf4", 0.0920), ("fp4", 0.1219), ("int4", 0.1079),
                                                  ("int4_affine", 0.0897)])
def test_the_error_on_normal_weights(quant_type, expected):
    """DESIGN.md's figures, made with another sample: 1 %."""
    back = dequantize(quantize_array(NORMAL, quant_type))
    assert float(jnp.sqrt(jnp.mean((back - NORMAL) ** 2))) == pytest.approx(expected, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type, block_size, shape", [(t, b, s) for t in QUANT_TYPES for b, s in [
    (32, (128, 8)), (None, (128, 8)), (None, (7, 33)), (32, (33, 7))]])
def test_no_value_is_off_by_more_than_half_a_step(quant_type, block_size, shape, double_quant):
    """Half the widest gap between codes, in units of the largest magnitude; double quantisation moves a scale by half
    a step of its code: at most 1 / 140 of the largest in its group, and only as far as scales differ."""
    gap = {"nf4": 0.304, "fp4": 1 / 3, "int4": 1 / 7, "int4_affine": 2 / 15, "int8": 1 / 127}[quant_type]
    array = NORMAL[:shape[0], :shape[1]]
    back = np.asarray(dequantize(quantize_array(array, quant_type, block_size=block_size, double_quant=double_quant)))
    largest = np.abs(array).max()
    assert back.shape == shape and np.abs(back - array).max() <= (gap / 2 + double_quant * 0.02) * largest * 1.0001


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_what_is_representable_comes_back(quant_type):
    leaf = quantize_array(NORMAL[:64, :8], quant_type)
    again = dequantize(quantize_array(dequantize(leaf), quant_type))
    np.testing.assert_allclose(again, dequantize(leaf), rtol=0, atol=1e-6)  # an affine range is taken anew
    zeros = quantize_array(np.zeros((5, 3), np.float32), quant_type, double_quant=True)
    assert (np.asarray(dequantize(zeros)) == 0).all()


def test_symmetric_integers_know_no_sign():
    plus, minus = (dequantize(quantize_array(sign * NORMAL[:64, :8], "int4")) for sign in (1, -1))
    assert np.array_equal(np.asarray(plus), -np.asarray(minus))


def test_constant_blocks_of_the_affine_type_are_exact():
    array = np.full((64, 3), 0.7, np.float32)
    assert np.array_equal(np.asarray(dequantize(quantize_array(array, "int4_affine"))), array)


@pytest.mark.parametrize("value", [1e-38, 3e38], ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_very_small_and_very_large_weights_stay_finite(quant_type, value):
    array = np.sign(NORMAL[:64, :4]) * np.float32(value)
    if quant_type == "int4_affine" and value > 1:
        with pytest.raises(PeftJaxError, match=r"the weights reach 3\.0e"):
            quantize_array(array, quant_type)
        return
    back = np.asarray(dequantize(quantize_array(array, quant_type)))
    assert np.isfinite(back).all() and np.abs(back - array).max() <= max(1e-36, 0.07 * value)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_abstract_arrays_give_the_same_shapes(quant_type, double_quant):
    def make(array):
        return quantize_array(array, quant_type, double_quant=double_quant)

    leaf, abstract = make(NORMAL[:96, :8]), jax.eval_shape(make, jax.ShapeDtypeStruct((96, 8), jnp.float32))
    assert jax.tree.structure(leaf) == jax.tree.structure(abstract)
    shapes, expected = ([(a.shape, a.dtype) for a in jax.tree.leaves(tree)] for tree in (abstract, leaf))
    assert shapes == expected
    assert (abstract.shape, abstract.nbytes, count(abstract)) == ((96, 8), leaf.nbytes, 96 * 8)
    # Exact equality is of what users run: with the loop emitters that conftest.py replaces where jaxlib has others.
    as_users = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
    jitted = jax.jit(make, compiler_options=as_users)(NORMAL[:96, :8])
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(leaf), jax.tree.leaves(jitted)))


def test_a_leaf_is_a_pytree_of_anything_and_knows_its_shape_when_sliced():
    leaf = quantize_array(NORMAL[:6].reshape(3, 64, 32), double_quant=True)
    assert (leaf.shape, leaf.ndim, leaf.size, leaf.dtype) == ((3, 64, 32), 3, 6144, jnp.float32)
    assert jax.tree.map(lambda a: a[0], leaf).shape == (64, 32)
    assert "?" in repr(jax.tree.map(lambda _: object(), leaf)) and "3x64x32" in repr(leaf)
    children, definition = jax.tree.flatten(leaf)
    assert isinstance(jax.tree.unflatten(definition, [object()] * len(children)), QuantizedArray)


@pytest.mark.parametrize("options, words", [
    ({"quant_type": "nf_4"}, "did you mean nf4"),
    ({"quant_type": "gptq"}, "choose one of: fp4, int4"),
    ({"block_size": 48}, "block_size=48 is none of 16, 32"),
    ({"block_size": 8192}, "block_size=8192"),
    ({"block_size": -64}, "block_size=-64"),
    ({"block_size": True}, "block_size=True"),
    ({"block_size": 64.0}, "block_size=64.0 is none of"),
    ({"block_size": 0}, "block_size=0 is none of .* or None, which is per channel"),
    ({"inputs": 4, "outputs": 4}, "such as inputs="),
    ({"array": np.ones((4, 4), np.int32)}, "this is int32"),
    ({"array": np.ones((0, 4), np.float32)}, "nothing to quantise"),
    ({"array": [[1.0]]}, "only arrays of floats"),
    ({"array": np.ones((2, 3, 4, 5), np.float32)}, "axes of an array of shape"),
    ({"inputs": (4,)}, "axes of an array of shape"),
    ({"inputs": (5,), "outputs": (4,)}, "are not the shape"),
])  # fmt: skip
def test_bad_arguments_are_told(options, words):
    with pytest.raises(PeftJaxError, match=words):
        quantize_array(**({"array": np.ones((4, 4), np.float32)} | options))


def test_a_block_size_of_numpy_is_kept_as_a_plain_number():
    assert type(quantize_array(NORMAL[:64, :8], block_size=np.int64(32)).block_size) is int


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("quant_type", ["nf4", "int4_affine", "int8"])
def test_weights_that_are_not_finite_are_told(quant_type, value):
    array = NORMAL[:64, :8].copy()
    array[3, 5] = value
    with pytest.raises(PeftJaxError, match=r"1 NaN or infinite values, the first at \(3, 5\)"):
        quantize_array(array, quant_type)


@pytest.mark.slow
def test_a_leaf_is_not_quantised_twice():
    with pytest.raises(PeftJaxError, match="quantised already"):
        quantize_array(quantize_array(NORMAL[:64, :8]))
    with pytest.raises(PeftJaxError, match="dequantize was given a ndarray"):
        dequantize(NORMAL)
