"""LoRA on embeddings: exchanged with peft, alone and as the tied head, and never part of all-linear."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, bind, flatten, load_adapter, lora, save_adapter, untie
from tests import peer, properties

peft = pytest.importorskip("peft")

LIST, REGEX = ("q_proj", "embed_tokens"), r"model\.(embed_tokens|layers\.[02]\.mlp\.up_proj)"
# name: (base, is the head still tied to the embedding, LoraConfig's arguments)
CASES = {
    "untied": ("llama", False, {"target_modules": LIST, "lora_alpha": 3}),
    "regex": ("llama", False, {"target_modules": REGEX}),
    "head left alone": ("tied", False, {"target_modules": LIST, "use_rslora": True}),
    "head tied": ("tied", True, {"target_modules": LIST, "rank_pattern": {"embed_tokens": 3, "lm_head": 3}}),
    "both": ("tied", False, {"target_modules": ("lm_head", "embed_tokens")}),
    "alone": ("tied", True, {"target_modules": ("embed_tokens",)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", peer.first_fast(CASES))
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, tied, options = CASES[case]
    fresh, model, params = peer_bases[name]
    base = (fresh, model, params if tied else untie(params))
    peer.check_opens_in_peft(base, lora(r=2, **options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    """As many parameters too, but for a tied head: peft counts the one update twice, under both names."""
    name, tied, options = CASES[case]
    fresh, model, base = peer_bases[name]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, ensure_weight_tying=tied, **{
        key: list(value) if isinstance(value, tuple) else value for key, value in options.items()})
    if not tied:
        method, params = peer.check_loads_from_peft(peer_bases[name], config, tmp_path)
    else:
        theirs = peft.get_peft_model(fresh(), config)
        peer.train_there(theirs)
        theirs.save_pretrained(tmp_path)
        method, params = load_adapter(tmp_path, base)
        peer.assert_close(peer.bound_logits(method, model, params), peer.torch_logits(theirs))
        trainable = peft_jax.partition(params, method.labels(params))[0]
        twice = peft_jax.count(trainable["embed_tokens"])
        assert peft_jax.count(trainable) + twice == theirs.get_nb_trainable_parameters()[0]
    assert ("lm_head" in params) == (not tied)
    merged = method.merge(params)
    peer.assert_close(peer.forward(model, merged), peer.bound_logits(method, model, params))
    if not tied and "lm_head" not in str(options["target_modules"]):
        head = untie(base)["lm_head"]["kernel"]
        np.testing.assert_array_equal(merged["lm_head"]["kernel"], head)


@pytest.mark.slow
def test_a_regex_that_keeps_the_tie_in_peft(peer_bases, tmp_path):
    """peft ties where the regex means the bare name: ours is written so, and theirs that does not is read untied."""
    regex = r"model\.(embed_tokens|layers\.[02]\.self_attn\.q_proj)"
    peer.check_opens_in_peft(peer_bases["tied"], lora(r=2, target_modules=regex), tmp_path / "ours")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=regex, ensure_weight_tying=True)
    _, params = peer.check_loads_from_peft(peer_bases["tied"], config, tmp_path / "theirs")
    assert "lm_head" in params


# Embeddings that peft does not keep tied, whatever its file asks for.
LEFT = {"adapted": {"target_modules": ["wte"]}, "by regex": {"target_modules": r"transformer\.(wte|h\.0\.mlp\.c_fc)"},
        "saved": {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}}


@pytest.mark.slow
@pytest.mark.parametrize("case", LEFT)
def test_a_head_that_peft_leaves_alone_is_untied(gpt2_base, case, tmp_path):
    fresh, model, base = gpt2_base
    method = lora(r=2, **LEFT[case])
    with pytest.raises(PeftJaxError, match=r"LORA changes 'wte', .* would be the embedding alone: peft_jax.untie"):
        save_adapter(tmp_path / "ours", method, model, method.init(jax.random.key(0), base))
    peer.check_opens_in_peft((fresh, model, untie(base)), method, tmp_path / "ours")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, ensure_weight_tying=True, fan_in_fan_out=True, **LEFT[case])
    _, params = peer.check_loads_from_peft(gpt2_base, config, tmp_path / "theirs")
    assert "lm_head" in params


@pytest.mark.parametrize("make", [peft_jax.ia3, peft_jax.loha, peft_jax.prefix])
def test_methods_of_which_peft_keeps_no_tie(peer_bases, make, tmp_path):
    _, model, base = peer_bases["tied"]
    method = make(modules_to_save=("embed_tokens",))
    with pytest.raises(PeftJaxError, match=r"changes 'embed_tokens', .* would be the embedding alone: peft_jax.untie"):
        save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_the_promises_of_a_method(peer_bases, tied):
    _, model, base = peer_bases["tied"]
    base = base if tied else untie(base)
    method = lora(r=2, target_modules=("embed_tokens",))
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_training(method, model, base, peer.IDS)
    if tied:
        properties.check_merge(method, model, base, peer.IDS)
    params = method.init(jax.random.key(0), base)
    trainable, _ = peft_jax.partition(params, method.labels(params))
    assert {path: leaf.shape for path, leaf in flatten(trainable).items()} == {
        "embed_tokens/lora_a": (37, 2), "embed_tokens/lora_b": (2, 16)}


def test_all_linear_leaves_embeddings_alone(peer_bases, tmp_path):
    _, model, base = peer_bases["tied"]
    method = lora(r=2, target_modules="all-linear")
    params = method.init(jax.random.key(0), base)
    assert not any(path.startswith("embed_tokens/lora") for path in flatten(params))
    save_adapter(tmp_path, method, model, params)
    assert "embed_tokens" not in load_adapter(tmp_path, base)[0].config["target_modules"]


@pytest.mark.slow
def test_an_embedding_of_any_model_written_out_in_numpy():
    class Foreign(nn.Module):
        @nn.compact
        def __call__(self, ids):
            table = nn.Embed(11, 6, name="table")
            x = table(ids)
            return table.attend(nn.Dense(6, name="out")(x))

    model, ids = Foreign(), np.arange(8).reshape(2, 4)
    base = model.init(jax.random.key(0), ids)["params"]
    axes = peft_jax.kernel_axes(model, base, ids)
    assert axes["table/embedding"] == ("Embed", (), (11,), (6,))
    method = lora(r=2, lora_alpha=3, target_modules=("table", "out"))
    params = properties.moved(method, method.init(jax.random.key(0), base, axes))
    whole = {name: base[name][leaf] + 1.5 * params[name]["lora_a"] @ params[name]["lora_b"]
             for name, leaf in (("table", "embedding"), ("out", "kernel"))}
    expected = (whole["table"][ids] @ whole["out"] + params["out"]["bias"]) @ whole["table"].T
    np.testing.assert_allclose(bind(method, model)({"params": params}, ids), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_a_regex_means_and_the_model_lacks_is_an_error(peer_bases):
    base = peer_bases["tied"][2]
    method = lora(r=2, target_modules=r".*(q_proj|lm_head)")
    with pytest.raises(PeftJaxError, match=r"matches lm_head, a kernel that this model lacks.*peft_jax.untie"):
        method.init(jax.random.key(0), base)
    assert "lora_a" in method.init(jax.random.key(0), untie(base))["lm_head"]
    without = lora(r=2, target_modules=r"(?!lm_head).*q_proj").init(jax.random.key(0), base)
    assert "lora_a" in without["layers"]["self_attn"]["q_proj"]


def test_ranks_of_a_tied_head(peer_bases, tmp_path):
    """peft scales the one update by the head's own rank there: we say it in the file, and refuse where it differs."""
    fresh, model, base = peer_bases["tied"]
    method = lora(r=2, target_modules=("embed_tokens",), rank_pattern={"embed_tokens": 3}, lora_alpha=4)
    peer.check_opens_in_peft((fresh, model, base), method, tmp_path / "ours")
    peft.get_peft_model(fresh(), peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], rank_pattern={"embed_tokens": 3}, r=2,
        ensure_weight_tying=True)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(PeftJaxError, match="different ranks or alphas"):
        load_adapter(tmp_path / "theirs", base)


def test_an_embedding_is_no_target_of_methods_for_kernels(peer_bases):
    with pytest.raises(PeftJaxError, match="'embed_tokens', which matches no kernel"):
        peft_jax.ia3(target_modules=("embed_tokens",), feedforward_modules=()).init(
            jax.random.key(0), peer_bases["llama"][2])
