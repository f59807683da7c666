"""GPT-2 equals transformers' own (torch, float32), padded on both sides and packed; its adapters are peft's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import flatten, ia3, load_adapter, load_pretrained, lora, save_adapter, save_pretrained, untie
from peft_jax.errors import PeftJaxError
from tests import peer, properties
from tests.peer import IDS, assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


# IA3 as peft has it for GPT-2: the joint projection's outputs, and the inputs of the feed-forward block's second layer.
FEED = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}


@pytest.fixture(scope="module")
def base(gpt2_base):
    """(makes a fresh torch model, Flax model, params)."""
    return gpt2_base


def torch_logits(model, ids, mask):
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask),
                     position_ids=torch.tensor(positions)).logits.numpy()


@pytest.mark.slow
def test_logits_with_padding_and_packed(base):
    fresh, model, params = base
    ids, mask = np.random.default_rng(1).integers(0, 37, (3, 12)), np.ones((3, 12), np.int64)
    mask[1, :4] = mask[2, 5:] = 0
    real = mask.astype(bool)
    assert_close(np.asarray(model.apply({"params": params}, ids, mask))[real], torch_logits(fresh(), ids, mask)[real])
    segments = np.array([[1] * 5 + [2] * 7])
    packed = np.asarray(model.apply({"params": params}, ids[:1], segment_ids=segments))
    for segment in (1, 2):
        own = segments == segment
        assert_close(packed[own], torch_logits(fresh(), ids[:1][own][None], mask[:1][own][None])[0])


@pytest.mark.slow
def test_more_tokens_than_positions_are_an_error(base):
    _, model, params = base
    ids = np.ones((1, 33), int)
    for run in (model.apply, jax.jit(model.apply)):
        with pytest.raises(PeftJaxError, match="a row of 33 tokens is longer than the model's 32 positions"):
            run({"params": params}, ids)
    assert np.isfinite(model.apply({"params": params}, ids, np.arange(33)[None] > 0)[:, 1:]).all()
    assert np.isfinite(model.apply({"params": params}, ids, segment_ids=np.arange(33)[None] // 20 + 1)).all()


@pytest.mark.slow
def test_transformers_opens_what_is_saved_and_bare_checkpoints_are_read(base, tmp_path):
    fresh, model, params = base
    save_pretrained(tmp_path / "again", model, params)
    again, said = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert_close(peer.torch_logits(again.eval()), peer.torch_logits(fresh()), 1e-6)
    fresh().transformer.save_pretrained(tmp_path / "bare")  # as the Hub's gpt2 is, without "transformer."
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path / "bare")[1], params)


@pytest.mark.slow
def test_an_untied_head_is_written_and_read(base, tmp_path):
    _, model, params = base
    params = untie(params)
    params["lm_head"]["kernel"] += 0.1
    save_pretrained(tmp_path, model, params)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_close(model.apply({"params": params}, IDS), peer.torch_logits(theirs))
    again, loaded = load_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_feature_that_changes_the_result_is_refused(base, tmp_path):
    _, model, params = base
    save_pretrained(tmp_path, model, params)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(PeftJaxError, match="scale_attn_by_inverse_layer_idx=True is not supported"):
        load_pretrained(tmp_path)


LORA = {"defaults": {"target_modules": ["c_attn"]}, "all": {"target_modules": "all-linear", "bias": "lora_only"},
        "layer": {"target_modules": ["attn.c_proj", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"},
        "head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
        "embedding": {"target_modules": ["c_fc"], "modules_to_save": ["wte"]}}


@pytest.mark.slow
@pytest.mark.parametrize("case", LORA)
def test_lora_is_exchanged_with_peft(base, case, tmp_path):
    fresh, model, params = base
    if case in ("head", "embedding"):
        params = untie(params)
    method = lora(r=2, init_lora_weights=False, **LORA[case])
    peer.check_opens_in_peft((fresh, model, params), method, tmp_path / "ours")
    stated = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert stated["fan_in_fan_out"] is True and stated["task_type"] == "CAUSAL_LM"
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True, **LORA[case])
    peer.check_loads_from_peft(base, config, tmp_path / "theirs")


@pytest.mark.slow
def test_ia3_is_exchanged_with_peft(base, tmp_path):
    peer.check_opens_in_peft(base, ia3(**FEED), tmp_path / "ours")
    config = peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True, **FEED)
    peer.check_loads_from_peft(base, config, tmp_path / "theirs")


def test_a_llama_adapter_says_no_fan_in_fan_out(peer_bases, tmp_path):
    _, model, params = peer_bases["llama"]
    method = lora(r=2)
    save_adapter(tmp_path, method, model, method.init(jax.random.key(0), params))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False


@pytest.mark.slow
def test_training_and_rematerialisation(base):
    _, model, params = base
    method = lora(r=2, target_modules=("c_attn", "c_fc"))
    properties.check_start_is_base(method, model, params, IDS)
    properties.check_training(method, model, params, IDS)
    properties.check_remat(method, model, params, IDS)


@pytest.mark.slow
def test_loaded_leaves_are_where_they_were_saved_from(base, tmp_path):
    _, model, params = base
    method = lora(r=2, target_modules=("c_attn",), init_lora_weights=False)
    tuned = method.init(jax.random.key(0), params)
    save_adapter(tmp_path, method, model, tuned)
    for path, leaf in flatten(load_adapter(tmp_path, params)[1]).items():
        assert jnp.array_equal(leaf, flatten(tuned)[path]), path
    assert peft_jax.count(tuned["h"]["attn"]["c_attn"]["lora_b"]) == 3 * 2 * 48
