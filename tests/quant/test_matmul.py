"""Products with a leaf equal those with the array that it stands for, forward, backward, and in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import PeftJaxError, dequantize, quantize_array
from peft_jax.quant import attend, dot, plain, take
from peft_jax.quant.codebooks import QUANT_TYPES

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def close(ours, expected):
    """Two orders of summing some hundred float32 products: a few ulp of the largest."""
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("inputs, outputs", [((64,), (8,)), ((8, 12), (3, 5)), ((33,), (7,))], ids=str)
def test_dot_and_its_gradient(inputs, outputs, quant_type, double_quant):
    leaf = quantize_array(normal(*inputs, *outputs), quant_type, double_quant=double_quant, inputs=inputs,
                          outputs=outputs)
    x, back = normal(2, 3, *inputs), normal(2, 3, *outputs)
    kernel = dequantize(leaf)
    y, pull = jax.vjp(jax.jit(lambda x: dot(x, leaf)), x)
    expected, expected_pull = jax.vjp(lambda x: jnp.tensordot(x, kernel, len(inputs), precision="highest"), x)
    close(y, expected)
    close(pull(back)[0], expected_pull(back)[0])
    close(dot(x, kernel, axes=len(inputs)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("hidden", [64, 96, 33])
def test_an_embedding_is_looked_up_and_multiplied(quant_type, hidden):
    table = quantize_array(normal(11, hidden), quant_type, double_quant=True, inputs=(11,), outputs=(hidden,),
                           by_rows=True)
    ids, x, dense = np.array([[0, 10, 3], [-1, 3, 5]]), normal(2, hidden), dequantize(table)
    assert np.array_equal(jax.jit(take)(table, ids), dense[ids])
    assert np.isnan(take(table, np.array([11, -12]))).all() and np.isnan(take(dense, np.array([11, -12]))).all()
    close(attend(x, table), x @ dense.T)
    close(jax.grad(lambda x: attend(x, table).sum())(x), jax.grad(lambda x: (x @ dense.T).sum())(x))
    close(attend(x, dense), x @ dense.T)
    close(dot(x, table.T), x @ dense.T)
    close(dot(normal(2, 11) * 0 + 1, table), np.ones((2, 11)) @ dense)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.uint32])
def test_ids_of_any_integer_type(dtype):
    dense = dequantize(table := quantize_array(normal(300, 32), inputs=(300,), outputs=(32,), by_rows=True))
    ids = np.array([0, 1, 100, 127], dtype)
    assert np.array_equal(take(table, ids), dense[ids.astype(int)]) and np.array_equal(take(table, 3), dense[3])
    last = np.array([np.iinfo(dtype).max], dtype)
    assert np.isnan(take(table, last)).all() == (last[0] >= 300)


@pytest.mark.slow
def test_several_features_and_half_precision():
    table = quantize_array(normal(6, 4, 16), inputs=(6,), outputs=(4, 16), by_rows=True)
    found = take(table, np.array([[5]]), jnp.bfloat16)
    assert found.shape == (1, 1, 4, 16) and found.dtype == jnp.bfloat16
    leaf, x = quantize_array(normal(64, 8).astype(jnp.bfloat16)), normal(3, 64)
    assert leaf.dtype == jnp.bfloat16 and dot(x, leaf).dtype == jnp.float32
    y = dot(x, leaf, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    assert np.array_equal(y, jax.jit(lambda a, b: a @ b)(x.astype(jnp.bfloat16), dequantize(leaf)))
    assert dot(normal(0, 64), leaf).shape == (0, 8)
    assert plain(x) is x and np.array_equal(plain(leaf), dequantize(leaf))


@pytest.mark.slow
def test_a_stack_is_sliced_by_scan_vmap_and_flax():
    leaf, x = quantize_array(normal(3, 32, 32), block_size=32, double_quant=True), normal(5, 32)
    layers = [jax.tree.map(lambda a, i=i: a[i], leaf) for i in range(3)]
    each = [dot(x, layer) for layer in layers]
    close(jax.vmap(dot, in_axes=(None, 0))(x, leaf), np.stack(each))
    chained = dot(dot(dot(x, layers[0]), layers[1]), layers[2])
    close(jax.lax.scan(lambda h, k: (dot(h, k), None), x, leaf)[0], chained)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, h, _):
            return dot(h, self.scope.get_variable("params", "kernel")), None

    stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    close(stack.apply({"params": {"kernel": leaf}}, x, None)[0], chained)


LAYERS, WIDTH, TOKENS = 8, 256, 32


def temporaries(kernels, remat):
    """Bytes of temporaries of the gradient in the biases of scanned layers tanh(h W + b), and the scans' outputs."""
    def loss(biases, kernels, x):
        def layer(h, kernel_bias):
            return jnp.tanh(dot(h, kernel_bias[0]) + kernel_bias[1]), None

        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, (kernels, biases))[0].sum()

    arguments = jnp.zeros((LAYERS, WIDTH)), kernels, jnp.ones((TOKENS, WIDTH))
    compiled = jax.jit(jax.grad(loss)).lower(*arguments).compile()
    scans = [eqn for eqn in jax.make_jaxpr(jax.grad(loss))(*arguments).eqns if eqn.primitive.name == "scan"]
    return compiled.memory_analysis().temp_size_in_bytes, [v.aval for eqn in scans for v in eqn.outvars]


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_one_layer_of_weights_is_decoded_at_a_time(quant_type):
    """With remat: the kept input of each layer, one layer's weights, and what a layer computes (five activations)."""
    leaf = quantize_array(normal(LAYERS, WIDTH, WIDTH), quant_type, double_quant=True)
    weights, activation = 4 * WIDTH**2, 4 * TOKENS * WIDTH
    found, _ = temporaries(leaf, remat=True)
    assert found <= LAYERS * activation + weights + 5 * activation
    # without remat the backward scan has a buffer for the weights of its own, and so has the plain kernel's
    found, outputs = temporaries(leaf, remat=False)
    assert found <= 2 * LAYERS * activation + 2 * weights + 5 * activation
    shapes = {(TOKENS, WIDTH), (LAYERS, TOKENS, WIDTH), (LAYERS, WIDTH)}  # carries, activations, gradients: no codes
    assert len(outputs) == 5 and {(a.shape, str(a.dtype)) for a in outputs} == {(s, "float32") for s in shapes}


def test_layers_without_a_scan_are_not_all_decoded_at_the_start():
    """The most that is live at once in a chain of products without gradients: two layers' weights, of eight."""
    leaves = [quantize_array(normal(WIDTH, WIDTH)) for _ in range(LAYERS)]

    def chain(x, leaves):
        for leaf in leaves:
            x = jnp.tanh(dot(x, leaf))
        return x

    compiled = jax.jit(chain).lower(jnp.ones((TOKENS, WIDTH)), leaves).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * 4 * WIDTH**2 + 5 * 4 * TOKENS * WIDTH


@pytest.mark.slow
def test_what_does_not_fit_is_told():
    leaf = quantize_array(normal(2, 64, 8))
    layer = jax.tree.map(lambda a: a[0], leaf)
    for product, words in {
        lambda: leaf.T: "has 3 axes, and only of two",
        lambda: dot(normal(3, 64), leaf): r"stack of \(2,\)",
        lambda: dot(normal(3, 32), layer): r"does not end in the kernel's inputs \(64,\)",
        lambda: dot(normal(3, 32), dequantize(layer)): r"does not end in the kernel's inputs \(64,\)",
        lambda: take(layer, np.array([1])): "is no embedding",
        lambda: take(dequantize(layer), np.array([1.0])): "by whole numbers, and the ids are float32",
        lambda: attend(normal(3, 32), layer): "does not fit an embedding",
    }.items():
        with pytest.raises(PeftJaxError, match=words):
            product()
