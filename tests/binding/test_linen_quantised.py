"""How modules of flax are read from quantised leaves: in their own dtype, or with an error that names them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import PeftJaxError, bind, kernel_axes, load_pretrained, lora, quantize

BF16, F32 = jnp.bfloat16, jnp.float32
X = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)


class Holder(nn.Module):
    """A module that ``make`` gives, called as ``call`` says."""

    make: object
    call: object = lambda module, x: module(x)

    @nn.compact
    def __call__(self, x):
        return self.call(self.make(name="held"), x)


def both(make, x=X, call=Holder.call):
    """What the module computes from the quantised leaf, and from the array that it stands for."""
    model = Holder(make, call)
    params = model.init(jax.random.key(0), x)["params"]
    method = quantize("int8", block_size=16, target_modules=("held",))
    held = method.init(None, params, axes=kernel_axes(model, params, x) or None)  # attend alone is not seen
    return bind(method, model)({"params": held}, x), model.apply({"params": method.merge(held)}, x)


def kind(dtype, param_dtype, make, **options):
    return lambda name: make(**options, dtype=dtype, param_dtype=param_dtype, name=name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, param_dtype", [(BF16, F32), (None, F32), (None, BF16), (F32, BF16)])
@pytest.mark.parametrize("make, options, call", [
    (nn.Dense, {"features": 16}, Holder.call),
    (nn.DenseGeneral, {"features": (2, 8)}, Holder.call),
    (nn.Einsum, {"shape": (64, 8), "einsum_str": "btd,dh->bth", "use_bias": False}, Holder.call),
    (nn.Embed, {"num_embeddings": 7, "features": 64}, lambda module, x: module(np.arange(7))),
    (nn.Embed, {"num_embeddings": 7, "features": 64}, lambda module, x: module.attend(x))],
    ids=["Dense", "DenseGeneral", "Einsum", "Embed", "attend"])  # fmt: skip
def test_it_computes_in_the_module_s_dtype(make, options, call, dtype, param_dtype):
    ours, expected = both(kind(dtype, param_dtype, make, **options), call=call)
    assert ours.dtype == expected.dtype
    near = 2**-6 if BF16 in (dtype, param_dtype) else 1e-5  # merged weights of bfloat16 have eight bits
    np.testing.assert_allclose(ours.astype(F32), expected.astype(F32), atol=near * float(jnp.abs(expected).max()))


@pytest.mark.slow
def test_a_model_of_float32_weights_computes_in_bfloat16(tiny_folder):
    method = quantize(block_size=16)
    model, base = load_pretrained(tiny_folder, method=method)
    out = jax.eval_shape(bind(method, model.clone(dtype=BF16)), {"params": base}, np.zeros((1, 4), np.int32))
    assert out.dtype == BF16


@pytest.mark.parametrize("make, call", [
    (lambda name: nn.DenseGeneral(4, axis=(-1, -2), name=name), Holder.call),
    (lambda name: nn.remat(nn.Dense)(16, name=name), Holder.call),
    (lambda name: nn.Dense(16, name=name), lambda module, x: module(inputs=x)),
    (lambda name: nn.Embed(7, 64, name=name), lambda module, x: module.attend(query=x))])
def test_it_is_read_as_flax_reads_it(make, call):
    ours, expected = both(make, X[:, :, :5] if isinstance(make("x"), nn.DenseGeneral) else X, call)
    np.testing.assert_allclose(ours, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_methods_see_an_input_that_is_given_by_name():
    model, method = Holder(lambda name: nn.Dense(16, name=name), lambda module, x: module(inputs=x)), lora(
        target_modules=("held",), init_lora_weights=False)
    params = method.init(jax.random.key(0), model.init(jax.random.key(0), X)["params"])
    np.testing.assert_allclose(bind(method, model)({"params": params}, X), model.apply(
        {"params": method.merge(params)}, X), atol=1e-5)


class Scaled(nn.Dense):
    """A Dense with more to it."""

    @nn.compact
    def __call__(self, x):
        """(..., in) -> (..., features)."""
        return 10 * super().__call__(x)


class Looked(nn.Embed):
    """An Embed that attends in its own way."""

    def attend(self, x):
        """(..., features) -> (..., num_embeddings)."""
        return 10 * super().attend(x)


@pytest.mark.parametrize("make, call, words", [
    (lambda name: Scaled(16, name=name), Holder.call, "'held' is a Scaled whose product is its own"),
    (lambda name: nn.remat(Scaled)(16, name=name), Holder.call, "Scaled whose product is its own"),
    (lambda name: Looked(7, 64, name=name), lambda module, x: module.attend(x), "'held' is a Looked whose product"),
    (lambda name: nn.Einsum((64, 8), use_bias=False, name=name), lambda module, x: module(x, "btd,dh->bth"),
     "'held' is a Einsum of which the input and output axes"),
    (lambda name: nn.Einsum((64, 8), "btd,dh->bh", use_bias=False, name=name), Holder.call, "give it a formula"),
    (lambda name: nn.Embed(7, 64, name=name), lambda module, x: module(X) if x is None else module.attend(x),
     "looked up by whole numbers, and the ids are float32")])
def test_what_is_not_read_is_an_error(make, call, words):
    model = Holder(make, call)
    params = model.init(jax.random.key(0), X)["params"]
    method = quantize(block_size=16, target_modules=("held",))  # the plain rule for axes: two are (in, out)
    held = method.init(None, params)
    with pytest.raises(PeftJaxError, match=words):
        bind(method, model)({"params": held}, None if "whole numbers" in words else X)
