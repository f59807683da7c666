"""Prompt tuning: embeddings in front of the input, with packing, padding, windows, cache; its exchange with peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import PeftJaxError, bind, chain, load_adapter, lora, prefix, prompt, save_adapter
from tests import peer, properties
from tests.methods.soft_prompt.test_prefix import windowed

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")


@pytest.mark.slow
def test_of_a_tied_embedding_moved_here_opens_in_peft(peer_bases, tmp_path):
    peer.check_opens_in_peft(peer_bases["tied"], prompt(4), tmp_path / "adapter")


@pytest.mark.slow
def test_trained_by_peft_loads_here(peer_bases, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    peer.check_loads_from_peft(peer_bases["qwen2"], config, tmp_path)


@pytest.mark.slow
def test_packing_padding_and_a_cache_change_nothing(peer_bases):
    _, model, base = peer_bases["llama"]
    properties.check_packing(prompt(4), model, base, peer.IDS)
    properties.check_decoding(prompt(4), model, base, peer.IDS)


@pytest.mark.slow
def test_in_a_window_it_slides_out_of_sight_as_in_peft(peer_bases, tmp_path):
    """Also with padding or other segments between it and the tokens that see it."""
    base = windowed(peer_bases)
    peer.check_opens_in_peft(base, prompt(4), tmp_path / "adapter")
    properties.check_packing(prompt(4), *base[1:], peer.IDS)
    properties.check_decoding(prompt(4), *base[1:], peer.IDS)


@pytest.mark.slow
def test_starts_from_embeddings_of_a_text(peer_bases):
    """The same as that text in front; a text that is too short is repeated, as in peft."""
    _, model, base = peer_bases["llama"]
    method = prompt(5, "TEXT", prompt_tuning_init_ids=(7, 3, 9))
    params = method.init(jax.random.key(0), base)
    behind = np.concatenate([np.tile([7, 3, 9, 7, 3], (2, 1)), peer.IDS], axis=1)
    expected = np.asarray(model.apply({"params": base}, behind))
    peer.assert_close(peer.bound_logits(method, model, params), expected[:, 5:], 1e-5)


def test_starts_from_the_vocabulary():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)), jnp.bfloat16)
    held = prompt(30, "SAMPLE_VOCAB").init(jax.random.key(0), {"embed_tokens": {"embedding": table}})["embed_tokens"]
    assert held["prompt"].dtype == jnp.float32
    found = (np.asarray(held["prompt"])[:, None] == np.asarray(table, np.float32)).all(-1)
    assert found.any(1).all() and found.any(0).sum() > 15


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_as_in_peft(peer_bases, tmp_path, side):
    """peft counts padding on the left as positions; given those, the logits are the same."""
    fresh, model, base = peer_bases["llama"]
    method = prompt(4)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    mask = np.arange(10)[None] >= np.array([[0], [4]])
    mask = mask if side == "left" else mask[:, ::-1]
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path)(
            torch.tensor(peer.IDS), attention_mask=torch.tensor(mask.astype(int))).logits.numpy()[:, 4:]
    places = np.arange(10)[None].repeat(2, 0)
    ours = np.asarray(bind(method, model)({"params": params}, peer.IDS, mask, positions=places))
    peer.assert_close(ours[mask], theirs[mask])
    alone = np.asarray(bind(method, model)({"params": params}, peer.IDS[1:][mask[1:]][None]))
    counted = np.asarray(bind(method, model)({"params": params}, peer.IDS, mask))[1][mask[1]]
    peer.assert_close(counted, alone[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_beside_lora_in_one_file(peer_bases, tmp_path, order):
    _, model, base = peer_bases["qwen2"]
    parts = [lora(r=2, target_modules="all-linear", init_lora_weights=False), prompt(4)]
    method = chain(*parts[::order])
    params = method.init(jax.random.key(0), base)
    save_adapter(tmp_path, method, model, params)
    again, loaded = load_adapter(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    merged = parts[0].merge(params)
    ours = peer.bound_logits(again, model, loaded)
    peer.assert_close(ours, peer.bound_logits(parts[1], model, merged), 1e-5)


def test_counts_are_the_closed_form():
    """n * hidden: 20 of Llama-3.2-3B are 61,440."""
    base = {"embed_tokens": {"embedding": jax.ShapeDtypeStruct((128_256, 3072), jnp.bfloat16)}}
    for how in ("RANDOM", "SAMPLE_VOCAB"):
        method = prompt(20, how)
        params = jax.eval_shape(lambda p, method=method: method.init(jax.random.key(0), p), base)
        assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == 61_440


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_virtual_tokens": True}, "num_virtual_tokens=True"), ({"prompt_tuning_init": "text"}, "one of: RANDOM"),
    ({"prompt_tuning_init": "TEXT"}, "'TEXT' starts from the token ids"), ({"prompt_tuning_init_ids": (1,)}, "'TEXT'"),
    ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_ids": "film"}, "give token ids"),
    ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_ids": (1, 99)}, "has 99, the embedding ends at 36"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(peer_bases, arguments, message):
    with pytest.raises(PeftJaxError, match=message):
        prompt(**arguments).init(jax.random.key(0), peer_bases["llama"][2])


def test_what_it_does_not_fit_is_an_error(peer_bases, tmp_path):
    _, model, base = peer_bases["llama"]
    method = prompt(4)
    params = method.init(jax.random.key(0), base)
    apply = bind(method, model)
    with pytest.raises(PeftJaxError, match=r"have 0 token embeddings \(embed_tokens, wte"):
        method.init(jax.random.key(0), {"dense": {"kernel": np.ones((2, 3))}})
    with pytest.raises(PeftJaxError, match="already hold virtual tokens"):
        chain(prompt(4), prefix(4)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="the cache was made without the 4 virtual tokens"):
        apply({"params": params, "cache": model.init_cache(2, 10)}, peer.IDS, mutable=["cache"])
    with pytest.raises(PeftJaxError, match="30 tokens and 4 virtual ones are more than the model's 32 positions"):
        apply({"params": params}, 1, 30, method="init_cache")
    with pytest.raises(PeftJaxError, match=r"attention_mask has shape \(2, 9\), input_ids \(2, 10\)"):
        apply({"params": params}, peer.IDS, np.ones((2, 9), int))
    with pytest.raises(PeftJaxError, match="method says num_virtual_tokens=5"):
        save_adapter(tmp_path / "a", prompt(5), model, params)


def test_other_models_are_an_error():
    """One with an embedding of that name, which never hands it to the method."""
    from flax import linen as nn

    class Other(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return nn.Embed(11, 6, name="embed_tokens")(ids)

    ids = jnp.zeros((1, 3), jnp.int32)
    params = prompt(4).init(jax.random.key(0), Other().init(jax.random.key(0), ids)["params"])
    with pytest.raises(PeftJaxError, match="never reads 1 trainable leaves, the first is 'embed_tokens/prompt'"):
        bind(prompt(4), Other())({"params": params}, ids)


@pytest.mark.slow
def test_adapters_of_two_decoders_are_refused_by_name(peer_bases, tmp_path):
    import json

    _, model, base = peer_bases["llama"]
    method = prompt(4)
    save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    path = tmp_path / "adapter_config.json"
    stated = json.loads(path.read_text())
    assert (stated["num_virtual_tokens"], stated["token_dim"]) == (4, 16)
    path.write_text(json.dumps({**stated, "num_transformer_submodules": 2}))
    with pytest.raises(PeftJaxError, match="num_transformer_submodules=2"):
        load_adapter(tmp_path, base)
    path.write_text(json.dumps({**stated, "num_virtual_tokens": 3}))
    with pytest.raises(PeftJaxError, match=r"prompt_embeddings is \[4, 16\], the model needs \[3, 16\]"):
        load_adapter(tmp_path, base)
