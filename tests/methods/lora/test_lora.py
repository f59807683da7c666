"""LoRA on the Llama-family decoder. Its exchange with real peft is in tests/hub/adapters/test_adapter.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, bind, combine, flatten, lora, partition, untie
from peft_jax.models import CausalLM, LlamaConfig
from peft_jax.train.step import init_state, make_step

CONFIG = LlamaConfig(
    vocab_size=41, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=64,
    tie_word_embeddings=True, qkv_bias=True,
)  # fmt: skip
MODEL = CausalLM(CONFIG)
IDS = np.arange(24).reshape(2, 12) * 5 % 41
# Layers of one stack with ranks of their own, one of them without an adapter.
UNEVEN = {"target_modules": ("q_proj", "down_proj"), "exclude_modules": ("layers.2.self_attn.q_proj",), "lora_alpha": 6,
          "rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"layers.1.mlp.down_proj": 9}}  # fmt: skip


@pytest.fixture(scope="session")
def base():
    """Random parameters, biases and norms too, in float32."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), IDS)["params"]
    shapes.pop("lm_head", None)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def logits(apply, params, **kwargs):
    return np.asarray(jax.jit(apply)({"params": params}, IDS, **kwargs))


def in_dtype(model, params, dtype):
    return model.clone(dtype=dtype, param_dtype=dtype), jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "remat"), [(jnp.float32, False), (jnp.bfloat16, True)])
def test_the_start_is_the_base_model_bit_for_bit(base, dtype, remat):
    model, params = in_dtype(MODEL.clone(remat=remat), base, dtype)
    method = lora(target_modules="all-linear", bias="all", modules_to_save=("norm",))
    tuned = method.init(jax.random.key(0), params)
    np.testing.assert_array_equal(logits(bind(method, model), tuned), logits(model.apply, params))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance", "options"), [
    (jnp.bfloat16, 0.04, {"target_modules": "all-linear", "use_rslora": True}), (jnp.float32, 1e-5, UNEVEN),
])
def test_merged_equals_unmerged(base, dtype, tolerance, options):
    model, params = in_dtype(MODEL, base, dtype)
    method = lora(r=2, init_lora_weights=False, **options)
    tuned = method.init(jax.random.key(0), params)
    merged = method.merge(tuned)
    assert flatten(jax.tree.map(lambda x: (x.shape, x.dtype), merged)) == flatten(
        jax.tree.map(lambda x: (x.shape, x.dtype), params))
    unmerged = logits(bind(method, model), tuned).astype(np.float32)
    largest = np.abs(unmerged).max()
    assert np.abs(unmerged - logits(model.apply, params)).max() > 0.1 * largest
    assert np.abs(unmerged - logits(model.apply, merged)).max() <= tolerance * largest


def test_the_branch_is_the_papers_equation(base):
    method = lora(r=2, init_lora_weights=False, **UNEVEN)
    tuned = flatten(method.init(jax.random.key(0), base))
    merged = flatten(method.merge(peft_jax.unflatten(tuned)))
    kernel, a, b = (np.asarray(tuned[f"layers/self_attn/q_proj/{name}"]) for name in ("kernel", "lora_a", "lora_b"))
    for layer, (rank, alpha) in enumerate([(5, 6), (2, 6), (0, 6)]):
        assert np.any(a[layer, :, :rank]) or rank == 0
        assert not a[layer, :, rank:].any() and not b[layer, rank:].any()
        update = alpha / max(rank, 1) * a[layer] @ b[layer]
        np.testing.assert_allclose(merged["layers/self_attn/q_proj/kernel"][layer], kernel[layer] + update, rtol=1e-5,
                                   atol=1e-6)


def test_counts_in_closed_form(base):
    """r (in + out) for each adapted matrix, and nothing for the padding of a stack."""

    def trainable(method):
        params = jax.eval_shape(lambda: method.init(jax.random.key(0), base))
        return peft_jax.count(partition(params, method.labels(params))[0]) - method.padding(params)

    attention, mlp = [(16, 16)] * 4, [(16, 24), (16, 24), (24, 16)]
    assert trainable(lora(r=4, target_modules="all-linear")) == 3 * 4 * sum(i + o for i, o in attention + mlp)
    assert trainable(lora(r=2, **UNEVEN)) == (5 + 2) * (16 + 16) + 3 * 2 * (24 + 16)
    assert trainable(lora(r=1, bias="all")) == 3 * (32 + 32) + 3 * (16 + 16 + 16)
    assert trainable(lora(r=1, bias="lora_only")) == 3 * (32 + 32) + 3 * (16 + 16)
    assert trainable(lora(r=1, modules_to_save=("norm",))) == 3 * (32 + 32) + 7 * 16


@pytest.mark.parametrize(("layers", "width", "values", "count"), [
    (28, 3072, 1024, 4_587_520),  # Llama 3.2 3B, of which the source article prints the next one's
    (32, 4096, 1024, 6_815_744),  # Llama 3.1 8B
    (1, 4096, 4096, 2 * 131_072),  # its one layer of 4096 x 4096: 16,777,216 -> 131,072
])
def test_counts_of_q_and_v_at_rank_16(layers, width, values, count):
    base = {"layers": {"self_attn": {
        "q_proj": {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16)},
        "v_proj": {"kernel": jax.ShapeDtypeStruct((layers, width, values), jnp.bfloat16)}}}}
    method = lora(r=16, target_modules=("q_proj", "v_proj"))
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), base)
    assert peft_jax.count(partition(params, method.labels(params))[0]) == count


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initial_values_have_the_stated_spread(init):
    method = lora(r=8, target_modules=("up",), init_lora_weights=init, rank_pattern={"layers.1.up": 2})
    up = method.init(jax.random.key(0), {"layers": {"up": {"kernel": jnp.zeros((2, 400, 3))}}})["layers"]["up"]
    for layer, rank in enumerate([8, 2]):
        own = np.asarray(up["lora_a"][layer, :, :rank])
        deviation = 1 / rank if init == "gaussian" else 1 / np.sqrt(3 * 400)
        assert abs(own.std() - deviation) < 0.1 * deviation
        assert init == "gaussian" or np.abs(own).max() <= 1 / np.sqrt(400)
    assert not up["lora_b"].any()


def test_a_modules_start_does_not_depend_on_the_other_targets(base):
    one, both = (lora(r=2, target_modules=names).init(jax.random.key(0), base)
                 for names in (("q_proj",), ("q_proj", "o_proj")))
    np.testing.assert_array_equal(one["layers"]["self_attn"]["q_proj"]["lora_a"],
                                  both["layers"]["self_attn"]["q_proj"]["lora_a"])


BATCH = {
    "input_ids": IDS[None], "segment_ids": np.ones_like(IDS)[None],
    "positions": np.tile(np.arange(12), (1, 2, 1)), "loss_index": np.tile(np.arange(11), (1, 2, 1)),
    "loss_target": IDS[None, :, 1:], "loss_weight": np.ones((1, 2, 11), np.float32),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "options"), [
    (False, {**UNEVEN, "bias": "all"}),
    (True, {"target_modules": "all-linear", "modules_to_save": ("norm", "lm_head"), "lora_dropout": 0.2}),
])  # fmt: skip
def test_training_moves_every_trainable_leaf_and_no_other(base, remat, options):
    model = MODEL.clone(remat=remat)
    method = lora(r=2, **options)
    params = method.init(jax.random.key(0), untie(base) if "modules_to_save" in options else base)
    trainable, frozen = partition(params, method.labels(params))
    before = jax.tree.map(np.array, params)
    tx = optax.adam(1e-2)
    state = init_state(trainable, tx, jax.random.key(1))
    assert peft_jax.count(state.opt_state) == 2 * peft_jax.count(trainable) + 1
    step = make_step(bind(method, model), tx, 64)
    for _ in range(2):
        state, metrics = step(state, frozen, BATCH)
    assert np.isfinite(metrics["loss"])
    after = flatten(combine(frozen, state.trainable))
    for path, leaf in flatten(before).items():
        moved = np.any(np.asarray(after[path]) != leaf)
        assert moved == (path in flatten(trainable)), path
    assert method.padding(params) == 0 or _padding_is_zero(after)


def _padding_is_zero(after):
    a, b = (np.asarray(after[f"layers/self_attn/q_proj/{name}"]) for name in ("lora_a", "lora_b"))
    return all(not a[layer, :, rank:].any() and not b[layer, rank:].any() for layer, rank in enumerate([5, 2, 0]))


@pytest.fixture(scope="session")
def dropped(base):
    """(logits without a key, with keys 0 and 1) at a dropout of one half, and the parameters."""
    method = lora(r=2, init_lora_weights=False, lora_dropout=0.5)
    params = method.init(jax.random.key(0), base)
    apply = jax.jit(bind(method, MODEL))
    keyed = [logits(apply, params, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    return logits(apply, params), keyed, params


@pytest.mark.slow
def test_dropout_needs_a_key_and_follows_it(dropped):
    plain, (first, again, other), params = dropped
    exact = lora(r=2, init_lora_weights=False)
    np.testing.assert_array_equal(plain, logits(bind(exact, MODEL), params))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, plain) and not np.allclose(first, other)


class OneDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(9, use_bias=False, name="q")(x)


@pytest.mark.slow
def test_dropout_acts_on_the_branchs_input_alone_and_is_unbiased():
    model, x = OneDense(), jax.random.normal(jax.random.key(0), (3, 7))
    base = model.init(jax.random.key(1), x)["params"]
    method = lora(r=7, target_modules=("q",), lora_dropout=0.25, init_lora_weights=False)
    params = method.init(jax.random.key(2), base)
    apply = bind(method, model)
    keys = jax.random.split(jax.random.key(3), 2000)
    samples = np.asarray(jax.jit(jax.vmap(lambda key: apply({"params": params}, x, rngs={"dropout": key})))(keys))
    branch = samples - np.asarray(model.apply({"params": base}, x))
    exact = np.asarray(apply({"params": params}, x)) - np.asarray(model.apply({"params": base}, x))
    assert np.all(np.abs(branch.mean(0) - exact) < 5 * branch.std(0) / np.sqrt(len(keys)))
    # with r at least the inputs, A B is one to one on them: each input was dropped, or grown by 1 / 0.75
    inputs = np.linalg.lstsq(np.asarray(params["q"]["lora_a"] @ params["q"]["lora_b"]).T * 8 / 7,
                             branch.reshape(-1, 9).T, rcond=None)[0].T.reshape(-1, 3, 7) / np.asarray(x)
    assert np.all(np.isclose(inputs, 0, atol=2e-2) | np.isclose(inputs, 4 / 3, atol=2e-2))
    assert abs(np.isclose(inputs, 0, atol=2e-2).mean() - 0.25) < 0.01


@pytest.mark.parametrize(("options", "message"), [
    ({"r": 0}, "r=0: a rank"), ({"r": True}, "a rank"), ({"lora_dropout": 1.0}, r"lora_dropout=1\.0"),
    ({"rank_pattern": {"q_proj": 2.5}}, r"rank_pattern\['q_proj'\]=2\.5"),
    ({"bias": "lora_onyl"}, r"bias='lora_onyl': did you mean lora_only\?"),
    ({"init_lora_weights": "gausian"}, r"did you mean gaussian\?"),
    ({"target_modules": "(q"}, "no regular expression"), ({"rank_pattern": {"*": 3}}, "no regular expression"),
    ({"target_modules": "all-linear", "layers_to_transform": 0}, "layers_to_transform needs target_modules as a list"),
])  # fmt: skip
def test_values_out_of_range_are_errors(options, message):
    with pytest.raises(PeftJaxError, match=message):
        lora(**options)


@pytest.mark.parametrize(("options", "message"), [
    ({"target_modules": ("q_porj",)}, r"target_modules has 'q_porj'.*did you mean q_proj\?"),
    ({"target_modules": ("lm_head",)}, r"target_modules has 'lm_head'.*peft_jax\.untie\(params\) gives it one"),
    ({"modules_to_save": ("lm_head",)}, r"modules_to_save has 'lm_head'.*untie it first with peft_jax.untie\(params\)"),
    ({"modules_to_save": ("nrom",)}, r"modules_to_save has 'nrom'.*did you mean norm\?"),
    ({"modules_to_save": ("proj",)}, "both adapted and, by the ending of its name, in modules_to_save"),
    ({"bias": "lora_only", "layers_to_transform": 1}, "bias='lora_only' on some layers"),
])  # fmt: skip
def test_arguments_that_do_not_fit_the_model_are_errors(base, options, message):
    with pytest.raises(PeftJaxError, match=message):
        lora(**options).init(jax.random.key(0), base)


def test_a_single_module_to_save_may_be_a_string(base):
    assert lora(modules_to_save="norm").config["modules_to_save"] == ("norm",)


@pytest.mark.slow
def test_untying_changes_no_logit_and_trains_apart(base):
    untied = untie(base)
    np.testing.assert_array_equal(untied["lm_head"]["kernel"], base["embed_tokens"]["embedding"].T)
    np.testing.assert_allclose(logits(MODEL.apply, untied), logits(MODEL.apply, base), rtol=1e-4, atol=1e-6)
    assert untie(untied) is untied and "lm_head" not in base
    labels = flatten(lora(modules_to_save="embed_tokens").labels(untied))
    assert (labels["embed_tokens/embedding"], labels["lm_head/kernel"]) == ("trainable", "frozen")
    with pytest.raises(PeftJaxError, match="embed_tokens"):
        untie({"norm": base["norm"]})


@pytest.mark.slow
def test_a_longer_stack_compiles_to_the_same_program_size(base):
    """The branch lies inside the scan: six layers are no more equations than three."""

    def equations(layers):
        model = CausalLM(dataclasses.replace(CONFIG, num_hidden_layers=layers))
        shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
        method = lora(target_modules="all-linear")
        tuned = jax.eval_shape(method.init, jax.random.key(0), shapes)
        return len(jax.make_jaxpr(lambda p: bind(method, model)({"params": p}, IDS))(tuned).jaxpr.eqns)

    assert equations(3) == equations(6)
