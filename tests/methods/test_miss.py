"""MiSS: the promises of every method, its equation, and its exchange with real peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import PeftJaxError, bind, miss
from tests import peer, properties

peft = pytest.importorskip("peft")

# name: (base, MissConfig's arguments). The same words make the adapter here and in peft. Modules have 16 or 24 inputs.
CASES = {
    "divides": ("llama", {"r": 4}),
    "a shard with zeros": ("qwen2", {"r": 5, "target_modules": "all-linear", "bias": "MiSS_only"}),
    "mini": ("llama", {"r": 7, "mini_r": 4, "init_weights": "mini", "target_modules": ["q_proj", "down_proj"],
                       "modules_to_save": ["model.norm"]}),
    "some layers": ("tied", {"r": 3, "target_modules": ["up_proj"], "layers_to_transform": [0, 2]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], miss(**options), tmp_path / "adapter")


@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_loads_from_peft(peer_bases[name], peft.MissConfig(task_type="CAUSAL_LM", **options), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"r": 5, "bias": "all"}, {"r": 4, "mini_r": 8, "init_weights": "mini"}],
                         ids=["default", "mini"])
def test_the_promises_of_a_method(peer_bases, options):
    _, model, base = peer_bases["qwen2"]
    method = miss(target_modules=("q_proj", "down_proj"), **options)
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_training(method, model, base, peer.IDS)
    properties.check_merge(method, model, base, peer.IDS)
    properties.check_remat(method, model, base, peer.IDS)


def test_layers_that_are_not_adapted_stay_the_base_whatever_their_leaf_says(peer_bases):
    _, model, base = peer_bases["qwen2"]
    method = miss(r=4, target_modules=("q_proj",), layers_to_transform=1)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    merged, before = (tree["layers"]["self_attn"]["q_proj"]["kernel"] for tree in (method.merge(params), base))
    assert [np.array_equal(one, other) for one, other in zip(merged, before)] == [True, False, True]
    assert method.padding(params) == 2 * 4 * 16
    properties.check_merge(method, model, base, peer.IDS)


@pytest.mark.slow
def test_input_and_output_axes_of_dense_general():
    """Written out in numpy on kernels of several input and output axes: row i of a kernel gets row i mod r of D."""
    model, x, base, axes = properties.generals()
    method = miss(r=3, target_modules=("split", "out"))
    params = properties.moved(method, method.init(jax.random.key(0), base, axes))

    def kernel(leaves, inputs):
        rows = np.asarray(leaves["miss_block"])[np.arange(inputs) % 3]
        return leaves["kernel"] + rows.reshape(leaves["kernel"].shape)

    mixed = np.einsum("bit,iac->btac", x, kernel(params["split"], 6)) + params["split"]["bias"]
    expected = np.einsum("btac,aco->bto", mixed, kernel(params["out"], 20)) + params["out"]["bias"]
    np.testing.assert_allclose(bind(method, model)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_dropout_needs_a_stream_and_changes_the_branch(peer_bases):
    _, model, base = peer_bases["llama"]
    method = miss(r=4, miss_dropout=0.5, init_weights=False)
    params = method.init(jax.random.key(0), base)
    still, one, other = (bind(method, model)({"params": params}, peer.IDS, rngs=rngs)
                         for rngs in (None, {"dropout": jax.random.key(1)}, {"dropout": jax.random.key(2)}))
    assert (still != one).any() and (one != other).any()
    plain = miss(r=4, init_weights=False)
    np.testing.assert_array_equal(bind(plain, model)({"params": params}, peer.IDS), still)


def test_no_rows_give_no_rows():
    """An empty last batch, as of any other method."""
    dense, x = nn.Dense(6), jnp.ones((0, 8))
    method = miss(r=3, target_modules=("up",))
    params = method.init(jax.random.key(0), {"up": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}})["up"]
    assert bind(method, dense)({"params": params}, x).shape == (0, 6)


def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    for options, words in (({"r": 17}, "r=17 can be at most the inputs"),
                           ({"r": 4, "mini_r": 3, "init_weights": "mini"}, "mini_r=3 must divide"),
                           ({"target_modules": ("down_porj",)}, r"did you mean down_proj\?")):
        with pytest.raises(PeftJaxError, match=words):
            miss(**options).init(jax.random.key(0), base)
    for options, words in (({"init_weights": "bat"}, "init_weights='bat'"), ({"bias": "lora_only"}, "bias='lora_only'"),
                           ({"mini_r": 0}, "mini_r=0")):
        with pytest.raises(PeftJaxError, match=words):
            miss(**options)
