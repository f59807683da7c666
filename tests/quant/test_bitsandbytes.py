"""Codes, scales and what they decode to equal bitsandbytes' on the CPU, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from peft_jax import dequantize, flatten, quantize_array
from peft_jax.quant.codebooks import dynamic
from tests.quant import theirs

# Blocks that divide; that do not; odd columns; one value; less than a block; a remainder of one.
SHAPES = {"whole": (24, 4096), "no whole blocks": (5, 100), "rows of 1.5 blocks": (6, 96), "odd": (7, 33),
          "one": (1, 1), "short": (3, 6), "one left": (1, 4097)}  # fmt: skip


def weights(shape, zeros):
    """Normal, some rows larger than others; with ``zeros`` some blocks are all zero, the last one too."""
    rng = np.random.default_rng(sum(shape))
    matrix = (rng.normal(size=shape) * np.exp(rng.normal(size=(shape[0], 1)))).astype(np.float32)
    if zeros:
        matrix[0] = matrix[-1] = 0
    return matrix


def check(matrix, quant_type, block_size, dtype):
    """Our leaf of the kernel (in, out) against theirs of the weight (out, in)."""
    packed, state = theirs.quantize(matrix, quant_type, block_size, dtype=dtype)
    leaf = quantize_array(jnp.asarray(matrix, dtype).T, quant_type, block_size=block_size)
    assert np.array_equal(np.asarray(leaf.codes).ravel(), packed.numpy().ravel())
    assert np.array_equal(theirs.bits(leaf.scales).ravel(), theirs.bits(state.absmax.numpy()))
    ours = np.asarray(jax.jit(dequantize)(leaf), np.float32).T
    assert leaf.dtype == dtype and np.array_equal(ours, theirs.dequantize(packed, state, matrix.shape))
    return leaf


@pytest.mark.slow
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_block_64_on_any_shape(quant_type, dtype, shape, zeros):
    check(weights(shape, zeros), quant_type, 64, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [32, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_other_blocks(quant_type, dtype, block_size):
    for shape in ((24, 4096), (7, 33)):
        check(weights(shape, False), quant_type, block_size, dtype)


def test_an_embedding_is_taken_by_rows():
    matrix = weights((50, 192), False)
    packed, state = theirs.quantize(matrix, "nf4", 64)
    leaf = quantize_array(matrix, inputs=(50,), outputs=(192,), by_rows=True)
    assert np.array_equal(np.asarray(leaf.codes).ravel(), packed.numpy().ravel())
    assert np.array_equal(np.asarray(dequantize(leaf)), theirs.dequantize(packed, state, matrix.shape))


@pytest.mark.slow
def test_a_stack_and_several_axes_are_as_each_layer_alone():
    kernel = np.random.default_rng(0).normal(size=(2, 8, 16, 3, 5)).astype(np.float32)
    leaf = quantize_array(kernel, double_quant=True, stack=(2,), inputs=(8, 16), outputs=(3, 5))
    back = np.asarray(dequantize(leaf))
    for i in range(2):
        packed, _ = theirs.quantize(kernel[i].reshape(128, 15).T, "nf4", 64, double_quant=True)
        assert np.array_equal(np.asarray(leaf.codes[i]).ravel(), packed.numpy().ravel())
        alone = quantize_array(kernel[i], double_quant=True, inputs=(8, 16), outputs=(3, 5))
        assert np.array_equal(back[i], np.asarray(dequantize(alone)))


@pytest.mark.parametrize("jitted, dtype, shape", [
    (True, dtype, shape) for dtype in ("float32", "bfloat16") for shape in ((512, 1536), (6, 96), (7, 33))
] + [(False, "float32", (6, 96))])
def test_doubly_quantised_bytes_are_read_to_the_bit(jitted, dtype, shape):
    matrix = weights(shape, False)
    packed, state = theirs.quantize(matrix, "nf4", 64, double_quant=True, dtype=dtype)
    ours = quantize_array(jnp.asarray(matrix, dtype).T, double_quant=True)
    read = (jax.jit(dequantize) if jitted else dequantize)(theirs.as_leaf(packed, state, ours))
    assert np.array_equal(np.asarray(read, np.float32).T, theirs.dequantize(packed, state, shape))


def scale_codes_that_differ(matrix):
    """(how many of our 8-bit scale codes differ from theirs, how many there are); each must be excused.

    Ours is the nearest. bitsandbytes' CPU rounds the number to one of 65536 steps over [-1, 1] first, so theirs may be
    one step, 2 / 65535, further off, no more: a midpoint tie to the precision of its table. The mean, which torch sums
    in another order, may differ by a few ulp and move the number by as many over the group's scale.
    """
    packed, state = theirs.quantize(matrix, "nf4", 64, double_quant=True)
    leaf, single = quantize_array(matrix.T, double_quant=True), quantize_array(matrix.T)
    assert np.array_equal(np.asarray(leaf.codes).ravel(), packed.numpy().ravel())
    mean, nested = state.offset.numpy(), state.state2.absmax.numpy()
    ulp = np.spacing(mean)
    assert abs(np.asarray(leaf.mean) - mean) <= 4 * ulp and np.abs(np.asarray(leaf.nested) - nested).max() <= 8 * ulp
    ours, other = np.asarray(leaf.scales).ravel(), state.absmax.numpy()
    at = np.nonzero(ours != other)[0]
    slack = 16 * ulp / nested[at // 256]
    number = (np.asarray(single.scales).ravel()[at] - mean) / nested[at // 256]
    off, their_off = (np.abs(number - dynamic()[codes[at]]) for codes in (ours, other))
    assert (off <= their_off + slack).all() and (their_off <= off + 2 / 65535 + slack).all()
    return len(at), len(ours)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_scale_codes_produced_differ_only_next_to_a_midpoint(spread):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2048, 2048)) * np.exp(spread * rng.normal(size=(2048, 1)))
    differ, count = scale_codes_that_differ(matrix.astype(np.float32))
    assert count == 65536 and differ / count < 0.004  # 0.2 %, if numbers and table steps were uniform: 255 / 65535 / 2


def test_int8_per_channel_has_bitsandbytes_codes():
    matrix = weights((24, 100), False)
    codes, absmax, _ = bnb.int8_vectorwise_quant(torch.tensor(matrix))
    leaf = quantize_array(matrix.T, "int8", block_size=None)
    assert np.array_equal(np.asarray(leaf.scales)[:, 0], absmax.numpy() * np.float32(1 / 127))
    assert np.array_equal(np.asarray(leaf.codes), codes.numpy())


@pytest.mark.real
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_on_smollm2(smollm2, quant_type):
    flat = flatten(smollm2[1])
    for path in ("layers/self_attn/q_proj/kernel", "layers/mlp/down_proj/kernel", "layers/mlp/up_proj/kernel"):
        kernels = np.asarray(flat[path], np.float32)
        stacked = quantize_array(kernels, quant_type)
        for layer in (0, 17):
            leaf = check(np.ascontiguousarray(kernels[layer].T), quant_type, 64, "float32")
            assert np.array_equal(np.asarray(stacked.codes[layer]), np.asarray(leaf.codes))
    embedding = np.asarray(flat["embed_tokens/embedding"], np.float32)
    differ, count = scale_codes_that_differ(np.ascontiguousarray(embedding))
    assert differ / count < 0.004
