"""LN tuning: single layers of a stack, and its exchange with real peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import PeftJaxError, chain, flatten, ln_tuning, lora, save_adapter, untie
from tests import peer, properties

peft = pytest.importorskip("peft")

# name: (base, LNTuningConfig's arguments). The same words make the adapter here and in peft.
CASES = {
    "tied": ("tied", {"target_modules": ["norm"]}),
    "a regex for some layers": ("llama", {"target_modules": r"model\.layers\.[02]\.input_layernorm"}),
    "one layer of a stack": ("llama", {"target_modules": ["layers.1.input_layernorm", "norm"]}),
    "excluded": ("llama", {"target_modules": ["input_layernorm", "post_attention_layernorm"],
                           "exclude_modules": ["layers.0.input_layernorm"]}),
    "kernels and biases": ("qwen2", {"target_modules": ["layers.2.self_attn.q_proj", "o_proj"]}),
    "saved": ("llama", {"target_modules": ["input_layernorm"], "modules_to_save": ["model.norm", "lm_head"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", peer.first_fast(CASES))
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], ln_tuning(**options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    peer.check_loads_from_peft(peer_bases[name], peft.LNTuningConfig(task_type="CAUSAL_LM", **options), tmp_path)


@pytest.mark.slow
def test_an_embedding_that_is_the_head_is_untied_first(peer_bases, gpt2_base, tmp_path):
    for name, (_, model, base) in {"wte": gpt2_base, "embed_tokens": peer_bases["tied"]}.items():
        method = ln_tuning([name])
        with pytest.raises(PeftJaxError, match=f"LN_TUNING changes '{name}', .* would be the embedding alone"):
            save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    fresh, model, base = gpt2_base
    peer.check_opens_in_peft((fresh, model, untie(base)), ln_tuning(["wte"]), tmp_path / "untied")


@pytest.mark.slow
def test_the_promises_of_a_method(peer_bases):
    _, model, base = peer_bases["qwen2"]
    method = ln_tuning(["layers.1.input_layernorm", "norm", "post_attention_layernorm", "layers.0.self_attn.q_proj"])
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_training(method, model, base, peer.IDS)
    properties.check_merge(method, model, base, peer.IDS)
    properties.check_remat(method, model, base, peer.IDS)


def test_a_stack_of_which_some_layers_train_holds_copies_of_those_alone(peer_bases):
    """So that an optimiser keeps nothing for the others, and weight decay cannot touch them."""
    base = peer_bases["llama"][2]
    method = ln_tuning(target_modules=("layers.0.input_layernorm", "layers.2.input_layernorm", "norm"))
    params = method.init(jax.random.key(0), base)
    trainable, _ = peft_jax.partition(params, method.labels(params))
    shapes = {path: leaf.shape for path, leaf in flatten(trainable).items()}
    assert shapes == {"ln_tuning/layers.input_layernorm.scale": (2, 16), "norm/scale": (16,)}
    np.testing.assert_array_equal(params["layers"]["input_layernorm"]["ln_tuning_at"], [0, -1, 1])
    merged = flatten(method.merge(properties.moved(method, params)))
    same = [np.array_equal(*pair) for pair in zip(merged["layers/input_layernorm/scale"],
                                                  base["layers"]["input_layernorm"]["scale"])]
    assert same == [False, True, False] and merged.keys() == flatten(base).keys()


def test_counts_are_the_closed_form():
    """The norms of Llama-3.2-3B: (2 * 28 + 1) * 3072, in place, none added."""
    layers = {name: {"scale": jax.ShapeDtypeStruct((28, 3072), jnp.bfloat16)} for name in
              ("input_layernorm", "post_attention_layernorm")}
    layers["q_proj"] = {"kernel": jax.ShapeDtypeStruct((28, 3072, 3072), jnp.bfloat16)}
    method, base = ln_tuning(), {"layers": layers, "norm": {"scale": jax.ShapeDtypeStruct((3072,), jnp.bfloat16)}}
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), base)
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == 57 * 3072


@pytest.mark.slow
def test_beside_lora(peer_bases):
    _, model, base = peer_bases["llama"]
    method = chain(ln_tuning(target_modules=("layers.1.input_layernorm", "norm")), lora(r=2))
    properties.check_merge(method, model, base, peer.IDS)
    clash = chain(ln_tuning(target_modules=("layers.1.self_attn.q_proj",)), lora(r=2))
    params = clash.init(jax.random.key(0), base)
    for act in (clash.merge, lambda p: peft_jax.bind(clash, model)({"params": p}, peer.IDS)):
        with pytest.raises(PeftJaxError, match="q_proj' trains in some layers only, by ln_tuning, and"):
            act(params)


def test_what_cannot_be_meant_is_an_error(peer_bases, tmp_path):
    _, model, base = peer_bases["tied"]
    with pytest.raises(PeftJaxError, match=r"did you mean input_layernorm\?"):
        ln_tuning(target_modules=("input_layernrom",)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="both adapted and, by the ending of its name, in modules_to_save"):
        ln_tuning(modules_to_save=("norm",)).init(jax.random.key(0), base)
    method = ln_tuning(target_modules=("embed_tokens",))
    with pytest.raises(PeftJaxError, match=r"the head as well; .* peft_jax.untie\(params\) first"):
        peft_jax.save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    with pytest.raises(PeftJaxError, match="already hold 'ln_tuning' leaves"):
        method.init(jax.random.key(0), method.init(jax.random.key(0), base))
