"""Prefix tuning: its equation, its place among positions, windows, packing and cache, its exchange with real peft."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import (
    PeftJaxError,
    bind,
    chain,
    flatten,
    load_adapter,
    lora,
    prefix,
    prefix_from_ids,
    save_adapter,
)
from tests import peer, properties

peft = pytest.importorskip("peft")

# name: (base, PrefixTuningConfig's arguments). The same words make the adapter here and in peft.
CASES = {
    "zero": ("qwen2", {"init_weights": "zero", "num_layers": 3, "token_dim": 8, "num_attention_heads": 2}),
    "projection": ("llama", {"prefix_projection": True}),
    "zero projection": ("qwen2", {"prefix_projection": True, "encoder_hidden_size": 5, "init_weights": "zero"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", peer.first_fast(CASES))
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], prefix(4, **options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    peer.check_loads_from_peft(peer_bases[name], config, tmp_path, whole="prefix_projection" not in options)


@pytest.mark.parametrize("case", CASES)
def test_as_many_parameters_train_as_in_peft(peer_bases, case):
    name, options = CASES[case]
    fresh, _, base = peer_bases[name]
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    count, _ = peft.get_peft_model(fresh(), config).get_nb_trainable_parameters()
    method = prefix(4, **options)
    params = method.init(jax.random.key(0), base)
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == count


@pytest.mark.slow
def test_a_projection_trains_and_under_remat_too(peer_bases):
    """A plain prefix does in test_every_method.py."""
    _, model, base = peer_bases["llama"]
    properties.check_training(prefix(4, prefix_projection=True), model, base, peer.IDS)
    properties.check_remat(prefix(4, prefix_projection=True), model, base, peer.IDS)


@pytest.mark.slow
@pytest.mark.parametrize("shifted", [True, False])
def test_packing_padding_and_a_cache_change_nothing(peer_bases, shifted):
    method = prefix(4, shift_positions=shifted)
    properties.check_packing(method, *peer_bases["llama"][1:], peer.IDS)
    properties.check_decoding(method, *peer_bases["llama"][1:], peer.IDS)


@pytest.mark.slow
def test_the_equation_written_out(tiny_model):
    """One layer's attention with grouped heads, from its queries, keys and values."""
    model, base = tiny_model
    method = prefix(3, shift_positions=False)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    seen = {}

    def look(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        if context.module.name == "core" and context.method_name == "__call__":
            jax.debug.callback(lambda *all_: seen.setdefault("layers", []).append(all_), *args[:3], out)
        return out

    from flax import linen as nn

    with nn.intercept_methods(look):
        bind(method, model)({"params": params}, peer.IDS[:1])
    jax.effects_barrier()
    held = np.asarray(params["layers"]["self_attn"]["core"]["prefix"]).reshape(2, 3, 2, 2, 8)
    for layer, (query, key, value, out) in enumerate(seen["layers"]):
        key, value = (np.concatenate([held[layer, :, i], x[0]]).repeat(2, 1) for i, x in enumerate((key, value)))
        scores = np.einsum("tnh,snh->nts", query[0], key) / np.sqrt(8)
        scores[:, ~np.tri(10, 13, 3, dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), value)
        np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5)
    assert len(seen["layers"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shifted", [True, False])
def test_a_prefix_from_a_text_is_that_text_in_front(peer_bases, shifted):
    _, model, base = peer_bases["qwen2"]
    method = prefix(4, shift_positions=shifted)
    params = prefix_from_ids(method, model, method.init(jax.random.key(0), base), peer.IDS[0, :4])
    behind = np.concatenate([peer.IDS[:1, :4], peer.IDS[1:]], axis=1)
    expected = np.asarray(model.apply({"params": base}, behind))[:, 4:]
    peer.assert_close(peer.bound_logits(method, model, params)[1:], expected, 1e-5)


def windowed(peer_bases, window=5):
    """(makes a torch Mistral, model, params) with the weights of "llama"; every layer sees ``window`` tokens."""
    import transformers

    fresh, model, base = peer_bases["llama"]

    def mistral():
        theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**peer.SIZES, sliding_window=window))
        theirs.load_state_dict(fresh().state_dict())
        return theirs.eval()

    config = dataclasses.replace(model.config, sliding_window=window, sliding_layers=(True,) * 3)
    return mistral, model.clone(config=config), base


@pytest.mark.slow
def test_in_a_window_it_slides_out_of_sight_as_in_peft(peer_bases, tmp_path):
    base = windowed(peer_bases)
    peer.check_opens_in_peft(base, prefix(4), tmp_path / "adapter")
    properties.check_packing(prefix(4), *base[1:], peer.IDS)
    properties.check_decoding(prefix(4), *base[1:], peer.IDS)


def test_unshifted_it_stays_in_sight(peer_bases):
    _, model, base = windowed(peer_bases, 1)
    method = prefix(4, shift_positions=False)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    other = properties.moved(method, params, seed=1)
    ours, theirs = (peer.bound_logits(method, model, tree) for tree in (params, other))
    assert np.abs(ours - theirs)[:, -1].max() > 0.1 * np.abs(ours).max()


def test_unshifted_it_is_no_file_of_pefts(peer_bases, tmp_path):
    """Read as a shifted one it would give other logits without a word."""
    fresh, model, base = peer_bases["llama"]
    method = prefix(4, shift_positions=False)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    peer.check_same_bits(model, base, method, params, tmp_path)
    again, loaded = load_adapter(tmp_path, base)
    np.testing.assert_array_equal(peer.bound_logits(again, model, loaded), peer.bound_logits(method, model, params))
    with pytest.raises((KeyError, ValueError), match="PREFIX_TUNING_UNSHIFTED"):
        peft.PeftModel.from_pretrained(fresh(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(peer_bases, tmp_path, side):
    """Against peft, with the positions that it is given too."""
    import torch

    fresh, model, base = peer_bases["llama"]
    method = prefix(4)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    mask = np.arange(10)[None] >= np.array([[0], [4]])
    mask = mask if side == "left" else mask[:, ::-1]
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path)(
            torch.tensor(peer.IDS), attention_mask=torch.tensor(mask.astype(int)),
            position_ids=torch.tensor(positions)).logits.numpy()
    ours = np.asarray(bind(method, model)({"params": params}, peer.IDS, mask))
    peer.assert_close(ours[mask], theirs[mask])


@pytest.mark.slow
def test_beside_lora_in_one_file(peer_bases, tmp_path):
    _, model, base = peer_bases["qwen2"]
    method = chain(lora(r=2, target_modules="all-linear"), prefix(4, prefix_projection=True))
    params = properties.moved(method, method.init(jax.random.key(0), base), by=0.1)
    save_adapter(tmp_path, method, model, params)
    again, loaded = load_adapter(tmp_path, base)
    peer.assert_close(peer.bound_logits(again, model, loaded), peer.bound_logits(method, model, params), 1e-5)
    names = {path.rpartition("/")[2] for path in flatten(loaded)} - {path.rpartition("/")[2] for path in flatten(base)}
    assert names == {"lora_a", "lora_b", "lora_scaling", "prefix"}
    properties.check_training(method, model, base, peer.IDS)


@pytest.mark.parametrize(("layers", "width", "tokens", "count"), [
    (28, 1024, 200, 11_468_800), (28, 1024, 50, 2_867_200), (32, 4096, 20, 5_242_880)])  # fmt: skip
def test_counts_are_the_closed_form(layers, width, tokens, count):
    """2 n layers (kv heads * head size): Llama-3.2-3B as peft prints it, and the source's 32 layers of 32 heads."""
    kernel = {"kernel": jax.ShapeDtypeStruct((layers, 3072, width), jnp.bfloat16)}
    base = {"layers": {"self_attn": {"k_proj": kernel, "v_proj": kernel}}}
    method = prefix(tokens)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), base)
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == count


@pytest.mark.slow
def test_in_bfloat16_it_stays_float32(tiny_model):
    model, base = tiny_model
    params = prefix(4).init(jax.random.key(0), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base))
    assert params["layers"]["self_attn"]["core"]["prefix"].dtype == jnp.float32
    computing = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert bind(prefix(4), computing)({"params": params}, peer.IDS).dtype == jnp.bfloat16


@pytest.mark.parametrize(("arguments", "message"), [
    ({"num_virtual_tokens": 0}, "num_virtual_tokens=0: give a whole number"),
    ({"init_weights": "zeros"}, "did you mean zero?"), ({"init_std": "small"}, "init_std='small'"),
    ({"prefix_projection": 1.5}, "prefix_projection=1.5"), ({"encoder_hidden_size": 2.0}, "encoder_hidden_size=2.0"),
    ({"num_layers": 2}, r"num_layers=2, but this model has 3 \(in 'layers/self_attn'\)"),
    ({"token_dim": 16}, "token_dim=16, but this model has 8"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(peer_bases, arguments, message):
    with pytest.raises(PeftJaxError, match=message):
        prefix(**arguments).init(jax.random.key(0), peer_bases["llama"][2])


def test_models_that_it_does_not_fit_are_errors(peer_bases, tmp_path):
    _, model, base = peer_bases["llama"]
    method = prefix(4)
    params = method.init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match=r"have 0 kernels that make keys \(k_proj, c_attn"):
        method.init(jax.random.key(0), {"dense": {"kernel": np.ones((2, 3))}})
    with pytest.raises(PeftJaxError, match="already hold virtual tokens"):
        method.init(jax.random.key(0), params)
    with pytest.raises(PeftJaxError, match=r"has 2 kv heads of 4, the prefix is .* num_attention_heads=4"):
        bind(prefix(4, num_attention_heads=4), model)({"params": params}, peer.IDS)
    with pytest.raises(PeftJaxError, match="30 tokens and 4 virtual ones are more than the model's 32 positions"):
        bind(method, model)({"params": params}, 1, 30, method="init_cache")
    with pytest.raises(PeftJaxError, match=r"input_ids are \(3,\), the prefix has 4"):
        prefix_from_ids(method, model, params, [1, 2, 3])
    projected = prefix(4, prefix_projection=True)
    with pytest.raises(PeftJaxError, match="leave out prefix_projection"):
        prefix(4, prefix_projection=True, prefix_init_ids=(1, 2))
    with pytest.raises(PeftJaxError, match="without prefix_projection"):
        prefix_from_ids(projected, model, projected.init(jax.random.key(0), base), [1, 2, 3, 4])
    with pytest.raises(PeftJaxError, match="holds 4 virtual tokens, the method says num_virtual_tokens=5"):
        save_adapter(tmp_path / "a", prefix(5), model, params)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["prefix", "prompt", "ptuning"])
def test_smollm2_exchanges_virtual_tokens_with_peft(smollm2, smollm2_peer, kind, tmp_path):
    make = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig, "ptuning": peft.PromptEncoderConfig}
    options = {"ptuning": {"encoder_hidden_size": 32}}.get(kind, {})
    model, base, tokenizer = smollm2
    ids = tokenizer(["Review: a delight.\nIn one word, the movie is"], return_tensors="np")["input_ids"]
    peer.check_virtual_on_real(smollm2_peer, model, base, ids, getattr(peft_jax, kind)(8, **options),
                               make[kind](task_type="CAUSAL_LM", num_virtual_tokens=8, **options), tmp_path)
