"""BitFit: biases that are there and biases that are added."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, bind, bitfit, chain, flatten, lora, save_adapter
from tests import peer, properties


def count(method, base):
    params = method.init(jax.random.key(0), base)
    return peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) - method.padding(params)


def test_biases_that_are_there_are_counted(peer_bases):
    assert count(bitfit(), peer_bases["qwen2"][2]) == 3 * (16 + 8 + 8)  # of q, k, v in three layers


@pytest.mark.slow
def test_biases_that_are_added(peer_bases):
    _, model, base = peer_bases["llama"]
    method = bitfit(add_missing=True)
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_training(method, model, base, peer.IDS)
    properties.check_remat(method, model, base, peer.IDS)
    assert not method.mergeable
    assert count(method, base) == 3 * (16 + 8 + 8 + 16 + 24 + 24 + 16)
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    assert not [path for path in flatten(tuned) if path.startswith("lm_head") and "bias" in path]


def test_an_added_bias_is_the_one_that_a_model_with_a_place_for_it_has(peer_bases):
    """The same numbers as Qwen2's own biases of q, k and v, taken away from it and given back as added ones."""
    _, model, base = peer_bases["qwen2"]
    own = {path: leaf for path, leaf in flatten(base).items() if path.endswith("/bias")}
    without = {path: leaf * 0 if path in own else leaf for path, leaf in flatten(base).items()}
    bare = peft_jax.unflatten({path: leaf for path, leaf in without.items() if path not in own})
    method = bitfit(("q_proj", "k_proj", "v_proj"), add_missing=True)
    flat = flatten(method.init(jax.random.key(0), bare))
    assert all(flat[f"{path.removesuffix('bias')}bitfit_bias"].shape == leaf.shape for path, leaf in own.items())
    given = {f"{path.removesuffix('bias')}bitfit_bias": leaf for path, leaf in own.items()}
    zeros = {path: leaf for path, leaf in without.items() if path in own}  # the model asks for its own biases
    tuned = peft_jax.unflatten(flat | given | zeros)
    peer.assert_close(peer.bound_logits(method, model, tuned), np.asarray(peer.forward(model, base)), 1e-5)


CASES = {
    "all": ("qwen2", {}),
    "some layers": ("qwen2", {"target_modules": ("layers.0.self_attn.q_proj", "v_proj"),
                              "exclude_modules": ("layers.2.self_attn.v_proj",), "modules_to_save": ("norm",)}),
    "added": ("llama", {"add_missing": True}),
    "added in some layers": ("tied", {"target_modules": r"layers\.[02]\.mlp\..*", "add_missing": True}),
    "both": ("qwen2", {"target_modules": ("layers.1.self_attn.q_proj", "o_proj"), "add_missing": True}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_are_the_same_bits_and_only_what_trains(peer_bases, case, tmp_path):
    from safetensors.numpy import load_file

    name, options = CASES[case]
    _, model, base = peer_bases[name]
    method = bitfit(**options)
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, tuned)
    peer.check_same_bits(model, base, method, tuned, tmp_path)
    again, loaded = peft_jax.load_adapter(tmp_path, base)
    np.testing.assert_array_equal(peer.bound_logits(again, model, loaded), peer.bound_logits(method, model, tuned))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.size for tensor in stored.values()) == count(method, base)
    assert set(stored) <= {key for key in stored if key.endswith(("bias", "norm.weight"))}


def test_layers_that_are_not_chosen_stay_the_base_whatever_their_leaf_says(peer_bases):
    _, model, base = peer_bases["llama"]
    method = bitfit(r"layers\.1\.mlp\.up_proj", add_missing=True)
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    assert method.padding(tuned) == 2 * 24
    one = dict(flatten(tuned))
    one["layers/mlp/up_proj/bitfit_bias"] = one["layers/mlp/up_proj/bitfit_bias"] * np.array([[0.0], [1], [0]])
    np.testing.assert_array_equal(peer.bound_logits(method, model, tuned),
                                  peer.bound_logits(method, model, peft_jax.unflatten(one)))


def test_several_output_axes_and_norms(peer_bases):
    """Written out in numpy on a DenseGeneral of two output axes and a LayerNorm's bias."""

    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.DenseGeneral((4, 5), use_bias=False, name="split")(nn.LayerNorm(name="ln")(x))
            return nn.Dense(3, name="out")(y.reshape(*x.shape[:-1], 20))

    model, x = Foreign(), np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    base = model.init(jax.random.key(0), x)["params"]
    method = bitfit(add_missing=True)
    params = properties.moved(method, method.init(jax.random.key(0), base, peft_jax.kernel_axes(model, base, x)))
    split, out = params["split"], params["out"]
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) + params["ln"]["bias"]
    middle = np.einsum("bi,iac->bac", normed, split["kernel"]) + split["bitfit_bias"]
    expected = middle.reshape(2, 20) @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(bind(method, model)({"params": params}, x), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(params["ln"]["bias"]).max() > 0.1 and "bitfit_bias" not in out


@pytest.mark.slow
def test_beside_lora(peer_bases):
    _, model, base = peer_bases["llama"]
    method = chain(lora(r=2), bitfit(add_missing=True))
    properties.check_start_is_base(method, model, base, peer.IDS)
    params, alone = method.init(jax.random.key(0), base), bitfit(add_missing=True)
    both, one = (properties.moved(alone, tree) for tree in (params, alone.init(jax.random.key(0), base)))
    peer.assert_close(peer.bound_logits(method, model, both), peer.bound_logits(alone, model, one), 1e-5)


def test_what_cannot_be_meant_is_an_error(peer_bases):
    llama, qwen2 = peer_bases["llama"][2], peer_bases["qwen2"][2]
    for method, base, words in (
        (bitfit(), llama, "this model has no biases: add_missing=True"),
        (bitfit(("o_proj",)), qwen2, r"no biases in target_modules=\('o_proj',\)"),
        (bitfit(("o_porj",), add_missing=True), qwen2, r"did you mean o_proj\?"),
        (bitfit(modules_to_save=("nrom",)), qwen2, "modules_to_save has 'nrom'"),
    ):
        with pytest.raises(PeftJaxError, match=words):
            method.init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="add_missing='1'"):
        bitfit(add_missing="1")
