"""Trainable tokens: the promises of every method, tied and untied heads, and the exchange with real peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peft_jax
from peft_jax import PeftJaxError, chain, flatten, lora, trainable_tokens, untie
from tests import peer, properties

peft = pytest.importorskip("peft")

TOKENS = [int(i) for i in dict.fromkeys(peer.IDS.ravel()[[5, 2, 9]])]  # in the text, not in order
# name: (base, TrainableTokensConfig's arguments). The same words make the adapter here and in peft.
CASES = {
    "tied": ("tied", {}),
    "by name": ("tied", {"target_modules": ["embed_tokens"]}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "both": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "random": ("qwen2", {"init_weights": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", peer.first_fast(CASES))
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], trainable_tokens(TOKENS, **options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    config = peft.TrainableTokensConfig(token_indices=TOKENS, task_type="CAUSAL_LM", **options)
    method, _ = peer.check_loads_from_peft(peer_bases[name], config, tmp_path)
    assert method.config["token_indices"] == tuple(TOKENS)


@pytest.mark.slow
def test_a_head_that_is_tied_under_another_name(gpt2_base, tmp_path):
    """peft stores the rows under both names for any model, GPT-2 too."""
    peer.check_opens_in_peft(gpt2_base, trainable_tokens(TOKENS), tmp_path / "ours")
    config = peft.TrainableTokensConfig(token_indices=TOKENS, task_type="CAUSAL_LM")
    _, params = peer.check_loads_from_peft(gpt2_base, config, tmp_path / "theirs")
    assert "lm_head" not in params
    names = [set(load_file(tmp_path / one / "adapter_model.safetensors")) for one in ("ours", "theirs")]
    assert names[0] == names[1] and len(names[0]) == 2


def test_a_head_that_peft_takes_from_its_embedding(peer_bases, tmp_path):
    """Rows of the head alone on a tied model: peft gives the head rows of its own, so the tie is undone here."""
    config = peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["lm_head"], task_type="CAUSAL_LM")
    peer.check_loads_from_peft(peer_bases["tied"], config, tmp_path)


@pytest.mark.slow
def test_the_promises_of_a_method(peer_bases):
    _, model, base = peer_bases["tied"]
    method = trainable_tokens(TOKENS)
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_training(method, model, base, peer.IDS)
    properties.check_merge(method, model, base, peer.IDS)
    properties.check_remat(method, model, base, peer.IDS)


@pytest.mark.slow
def test_the_promises_with_a_head_of_its_own(peer_bases):
    _, model, base = peer_bases["llama"]
    method = trainable_tokens(TOKENS, ["embed_tokens", "lm_head"])
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_merge(method, model, base, peer.IDS)
    trainable, _ = peft_jax.partition(params := method.init(jax.random.key(0), base), method.labels(params))
    assert peft_jax.count(trainable) == len(TOKENS) * 16 * 2


def test_the_rows_are_those_of_the_tokens_and_no_others_change(peer_bases):
    base = peer_bases["tied"][2]
    method = trainable_tokens(TOKENS)
    params = method.init(jax.random.key(0), base)
    np.testing.assert_array_equal(params["embed_tokens"]["tokens"], base["embed_tokens"]["embedding"][np.array(TOKENS)])
    merged = method.merge(tuned := properties.moved(method, params))["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(merged[np.array(TOKENS)], tuned["embed_tokens"]["tokens"])
    others = np.setdiff1d(np.arange(37), TOKENS)
    np.testing.assert_array_equal(merged[others], base["embed_tokens"]["embedding"][others])


@pytest.mark.slow
def test_generation_reads_the_rows_too(peer_bases):
    """With the cache: hidden and head are called apart."""
    _, model, base = peer_bases["tied"]
    method = trainable_tokens(TOKENS)
    tuned = properties.moved(method, method.init(jax.random.key(0), base), by=1.0)
    ask = {"input_ids": peer.IDS, "attention_mask": np.ones_like(peer.IDS), "max_new_tokens": 6, "stop_ids": (36,)}
    ours = peft_jax.generate(peft_jax.bind(method, model), model, tuned, **ask)
    np.testing.assert_array_equal(ours, peft_jax.generate(model.apply, model, method.merge(tuned), **ask))
    assert not np.array_equal(ours, peft_jax.generate(model.apply, model, base, **ask))


@pytest.mark.slow
def test_beside_lora_in_one_file(peer_bases, tmp_path):
    _, model, base = peer_bases["tied"]
    method = chain(lora(r=2, init_lora_weights=False), trainable_tokens(TOKENS))
    properties.check_merge(method, model, base, peer.IDS)
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    peft_jax.save_adapter(tmp_path, method, model, tuned)
    peer.check_same_bits(model, base, method, tuned, tmp_path)


def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    for indices in ([], [3, 3], [-1], ["a"], [1.5]):
        with pytest.raises(PeftJaxError, match="give at least one token id, each once, none negative"):
            trainable_tokens(indices)
    with pytest.raises(PeftJaxError, match="has 40, but 'embed_tokens/embedding' ends at 36"):
        trainable_tokens([40]).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match=r"did you mean embed_tokens\?"):
        trainable_tokens([4], ["embed_token"]).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="merge first"):
        trainable_tokens([4]).init(jax.random.key(0), trainable_tokens([4]).init(jax.random.key(0), base))
    with pytest.raises(PeftJaxError, match="untie"):
        trainable_tokens([4], ["lm_head"]).init(jax.random.key(0), peer_bases["tied"][2])
    assert "lm_head" in untie(peer_bases["tied"][2])
    assert flatten(trainable_tokens([4], ["lm_head"]).init(jax.random.key(0), untie(peer_bases["tied"][2])))
    assert trainable_tokens(np.array([4, 2]).tolist()).config["token_indices"] == (4, 2)


@pytest.mark.slow
def test_many_tokens_in_any_shape_of_ids():
    from flax import linen as nn

    model, ids = nn.Embed(50, 8), np.arange(60).reshape(3, 4, 5) % 50
    base = model.init(jax.random.key(0), ids)["params"]
    base = {"embed": base}

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(50, 8, name="embed")(ids)

    method = trainable_tokens(np.random.default_rng(0).permutation(50)[:30].tolist())
    params = properties.moved(method, method.init(jax.random.key(0), base))
    expected = np.asarray(method.merge(params)["embed"]["embedding"])[ids]
    np.testing.assert_array_equal(peft_jax.bind(method, Net())({"params": params}, jnp.asarray(ids)), expected)
