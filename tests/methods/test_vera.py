"""VeRA: its options, its shared projections, and its exchange with real peft."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import peft_jax
from peft_jax import PeftJaxError, bind, chain, flatten, load_adapter, lora, save_adapter, vera
from tests import peer, properties

peft = pytest.importorskip("peft")

# name: (base, VeraConfig's arguments). The same words make the adapter here and in peft.
CASES = {
    "sizes": ("qwen2", {"r": 5, "target_modules": ["q_proj", "up_proj", "down_proj"], "bias": "vera_only"}),
    "all-linear": ("llama", {"r": 3, "target_modules": "all-linear", "d_initial": 0.5,
                             "modules_to_save": ["model.norm"]}),
    "some layers": ("tied", {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2],
                             "projection_prng_key": 7}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], vera(**options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_loads_from_peft(peer_bases[name], peft.VeraConfig(task_type="CAUSAL_LM", **options), tmp_path)


def test_the_projections_are_one_pair_from_one_seed(peer_bases):
    """Whatever key init is given; within peft's bounds, sqrt(6 / second side)."""
    base = peer_bases["llama"][2]
    one, other, third = (vera(r=6, target_modules="all-linear", projection_prng_key=seed).init(
        jax.random.key(key), base) for seed, key in ((3, 0), (3, 1), (4, 0)))
    for name, shape, bound in (("vera_a", (24, 6), np.sqrt(6 / 24)), ("vera_b", (6, 24), 1)):
        np.testing.assert_array_equal(one[name], other[name])
        assert one[name].shape == shape and (one[name] != third[name]).all()
        assert 0.9 * bound < np.abs(one[name]).max() <= bound


def test_counts_are_the_closed_form():
    """q and v of RoBERTa-base with r = 1024: 24 (768 + 1024) = 43,008, the paper's 0.043 M (Table 2)."""
    base = {name: {"kernel": jax.ShapeDtypeStruct((12, 768, 768), jnp.float32)} for name in ("q_proj", "v_proj")}
    method = vera(r=1024)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), {"layers": base})
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == 43_008


@pytest.mark.slow
def test_input_and_output_axes_of_dense_general():
    """Written out in numpy on kernels of several input and output axes."""
    model, x, base, axes = properties.generals()
    method = vera(r=2, target_modules=("split", "out"))
    params = properties.moved(method, method.init(jax.random.key(0), base, axes))
    a, b = params["vera_a"], params["vera_b"]

    def kernel(leaves, inputs, outputs):
        change = (a[:inputs] * leaves["vera_lambda_d"]) @ b[:, :outputs] * leaves["vera_lambda_b"].reshape(-1)
        return leaves["kernel"] + change.reshape(leaves["kernel"].shape)

    mixed = np.einsum("bit,iac->btac", x, kernel(params["split"], 6, 20)) + params["split"]["bias"]
    expected = np.einsum("btac,aco->bto", mixed, kernel(params["out"], 20, 3)) + params["out"]["bias"]
    np.testing.assert_allclose(bind(method, model)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_dropout_needs_a_stream_and_changes_the_branch(peer_bases):
    _, model, base = peer_bases["llama"]
    method = vera(r=4, vera_dropout=0.5, init_weights=False)
    params = method.init(jax.random.key(0), base)
    apply = bind(method, model)
    still, one, other = (apply({"params": params}, peer.IDS, rngs=rngs)
                         for rngs in (None, {"dropout": jax.random.key(1)}, {"dropout": jax.random.key(2)}))
    assert (still != one).any() and (one != other).any()
    plain = vera(r=4, init_weights=False)
    np.testing.assert_array_equal(bind(plain, model)({"params": params}, peer.IDS), still)


def test_a_file_without_projections_says_what_to_do(peer_bases, tmp_path):
    _, model, base = peer_bases["llama"]
    method = vera(r=4)
    save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({key: value for key, value in tensors.items() if key != "base_model.vera_A"},
              tmp_path / "adapter_model.safetensors")
    with pytest.raises(PeftJaxError, match=r"missing.*base_model\.vera_A"):
        load_adapter(tmp_path, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"save_projection": False}))
    with pytest.raises(PeftJaxError, match="save it from peft with save_projection=True"):
        load_adapter(tmp_path, base)


@pytest.mark.slow
def test_beside_lora_in_a_chain(peer_bases, tmp_path):
    _, model, base = peer_bases["llama"]
    method = chain(lora(r=2, target_modules=("up_proj",)), vera(r=4))
    params = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    _, again = load_adapter(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, flatten(again), flatten(params))
    merged = model.apply({"params": method.merge(params)}, peer.IDS)
    peer.assert_close(bind(method, model)({"params": params}, peer.IDS), np.asarray(merged), 1e-5)


@pytest.mark.slow
def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    with pytest.raises(PeftJaxError, match=r"did you mean down_proj\?"):
        vera(target_modules=("down_porj",)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="bias='lora_only'"):
        vera(bias="lora_only")
    with pytest.raises(PeftJaxError, match="bias='vera_only' on some layers"):
        vera(bias="vera_only", layers_to_transform=1).init(jax.random.key(0), peer_bases["qwen2"][2])
    with pytest.raises(PeftJaxError, match="already hold VERA"):
        method = vera(r=2)
        method.init(jax.random.key(0), method.init(jax.random.key(0), base))
