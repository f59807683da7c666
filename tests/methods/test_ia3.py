"""IA3: its options, its exchange with real peft. What holds for every method is in test_every_method.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import PeftJaxError, bind, flatten, ia3
from tests import peer, properties

peft = pytest.importorskip("peft")

# name: (base, IA3Config's arguments). The same words make the adapter here and in peft.
CASES = {
    "biases": ("qwen2", {"target_modules": ["q_proj", "v_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear", "feedforward_modules": ["down_proj", "o_proj"]}),
    "some layers": ("llama", {"target_modules": r".*\.layers\.[02]\..*(k|down)_proj",
                              "feedforward_modules": r".*down_proj"}),
    "saved": ("llama", {"target_modules": ["k_proj"], "feedforward_modules": [], "modules_to_save": ["norm"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", peer.first_fast(CASES))
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], ia3(**options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    config = peft.IA3Config(task_type="CAUSAL_LM", **options)
    peer.check_loads_from_peft(peer_bases[name], config, tmp_path)


def test_layers_that_are_not_adapted_stay_the_base_whatever_their_leaf_says(peer_bases):
    """One leaf serves a whole stack: where a layer is off, neither the forward pass nor the merge reads it."""
    _, model, base = peer_bases["qwen2"]
    method = ia3(target_modules=("layers.1.self_attn.q_proj",), feedforward_modules=())
    params = properties.moved(method, method.init(jax.random.key(0), base))
    merged = flatten(method.merge(params))
    for name in ("kernel", "bias"):
        path = f"layers/self_attn/q_proj/{name}"
        same = [np.array_equal(one, other) for one, other in zip(merged[path], flatten(base)[path])]
        assert same == [True, False, True]
    assert method.padding(params) == 2 * 16
    peer.assert_close(peer.bound_logits(method, model, params), peer.forward(model, method.merge(params)), 1e-5)


def test_counts_are_the_closed_form():
    """IA3 on k, v, down of Llama-3.2-3B: 28 (2 * 1024 + 8192) = 286,720, as peft prints."""
    shapes = {"k_proj": (28, 3072, 1024), "v_proj": (28, 3072, 1024), "down_proj": (28, 8192, 3072)}
    base = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)} for name, shape in shapes.items()}
    method = ia3()
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), {"layers": base})
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == 286_720


@pytest.mark.slow
def test_input_and_output_axes_of_dense_general():
    """Written out in numpy on kernels of several input and output axes."""
    model, x, base, axes = properties.generals()
    method = ia3(target_modules=("split", "out"), feedforward_modules=("out",))
    params = properties.moved(method, method.init(jax.random.key(0), base, axes))
    split, out = params["split"], params["out"]
    mixed = (np.einsum("bit,iac->btac", x, split["kernel"]) + split["bias"]) * split["ia3_out"]
    expected = np.einsum("btac,aco->bto", mixed * out["ia3_in"], out["kernel"]) + out["bias"]
    np.testing.assert_allclose(bind(method, model)({"params": params}, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    with pytest.raises(PeftJaxError, match=r"did you mean down_proj\?"):
        ia3(target_modules=("down_porj",)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="names some layers of the stack 'layers/mlp/down_proj' and not others"):
        ia3(feedforward_modules=("layers.0.mlp.down_proj",)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="init_ia3_weights='yes'"):
        ia3(init_ia3_weights="yes")
