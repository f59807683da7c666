"""Rows that say in words who sees whom: what the words mean, and that steps hold no array (T, S)."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from peft_jax import PeftJaxError, bind, lora, partition, prefix, prompt, ptuning
from peft_jax.models import attention, masks
from peft_jax.models.gpt2 import GPT2, GPT2Config
from peft_jax.models.llama import CausalLM, LlamaConfig
from peft_jax.planner.shapes import abstract, batch_shapes
from peft_jax.train.step import init_state, make_step

LLAMA = LlamaConfig(64, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 512, True)
GPT = GPT2Config(64, 32, 48, 2, 4, 512)
B, T = 4, 12
LENGTHS = np.array([12, 7, 1, 3])
MASKS = {
    "causal": masks.RowMask(T, True),
    "lengths": masks.RowMask(T, True, jnp.asarray(LENGTHS)),
    "window": masks.RowMask(T, True, jnp.asarray(LENGTHS), window=3),
    "a window in this layer": masks.RowMask(T, True, window=3, windowed=jnp.array(True)),
    "a window in other layers": masks.RowMask(T, True, window=3, windowed=jnp.array(False)),
    "a window that holds all": masks.RowMask(T, True, window=T),
    "keys in front": masks.RowMask(T, True, jnp.asarray(LENGTHS), window=3).behind(3),
    "both ways": masks.RowMask(T, False, jnp.asarray(LENGTHS)),
    "both ways, keys in front": masks.RowMask(T, False, jnp.asarray(LENGTHS)).behind(3),
}


def seen(mask):
    """Who sees whom, (B, T, S), one pair at a time."""
    first = mask.keys - T
    window = mask.window if mask.window and (mask.windowed is None or bool(mask.windowed)) else mask.keys
    lengths = np.full(B, mask.keys) if mask.lengths is None else np.asarray(mask.lengths)
    return np.array([[[k < lengths[row] and (not mask.causal or 0 <= q + first - k < window)
                       for k in range(mask.keys)] for q in range(T)] for row in range(B)])


@pytest.mark.parametrize("name", MASKS)
def test_the_words_mean_what_the_array_says(name):
    np.testing.assert_array_equal(masks.dense(MASKS[name], (B, T))[:, 0], seen(MASKS[name]))


def test_segments_see_themselves():
    ids = jnp.array([[1, 1, 2, 0]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert masks.dense(masks.RowMask(4, True, segment_ids=ids), (1, 4))[0, 0].astype(int).tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MASKS)
def test_what_cudnn_is_told_is_the_same(name):
    """In the words of jax.nn.dot_product_attention, which mean the same in each of its programs; gradients too."""
    mask = MASKS[name]
    shapes = [(B, T, 4, 8), (B, mask.keys, 2, 8), (B, mask.keys, 2, 8)]
    arrays = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    ends = T if mask.lengths is None else mask.lengths[:, None] - (mask.keys - T)
    real = (jnp.arange(T) < ends)[..., None, None]

    def told(*arrays):
        return jnp.where(real, attention._cudnn(*arrays, mask, program="xla"), 0)

    def plain(*arrays):
        return jnp.where(real, attention._xla(*arrays, mask), 0)

    (found, pull), (expected, pull_plain) = jax.vjp(told, *arrays), jax.vjp(plain, *arrays)
    for one, other in zip((found, *pull(found)), (expected, *pull_plain(expected)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_rows_of_padding_alone_are_finite_and_lengths_are_checked():
    model, ids = CausalLM(LLAMA), np.ones((2, 5), np.int32)
    params = model.init(jax.random.key(0), ids)["params"]
    assert np.isfinite(model.apply({"params": params}, ids, lengths=np.array([5, 0]))).all()
    for given in ({"lengths": np.array([5])}, {"lengths": np.array([5, 5]), "segment_ids": ids}):
        with pytest.raises(PeftJaxError, match="give one number a row, and no segment_ids"):
            model.apply({"params": params}, ids, **given)


MODELS = {"llama": CausalLM(LLAMA), "gpt2": GPT2(GPT),
          "mixed windows": CausalLM(replace(LLAMA, sliding_window=4, sliding_layers=(True, False))),
          "one window": CausalLM(replace(LLAMA, sliding_window=4, sliding_layers=(True, True)))}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_what_an_attention_mask_and_segments_say(name):
    model, ids = MODELS[name], np.random.default_rng(0).integers(1, 64, (B, T))
    params = model.init(jax.random.key(0), ids)["params"]
    real = np.arange(T) < LENGTHS[:, None]
    given = ({"lengths": LENGTHS}, {"attention_mask": real.astype(int)}, {"segment_ids": real.astype(int)})
    found, *others = (np.asarray(model.apply({"params": params}, ids, **one))[real] for one in given)
    for other in others:
        np.testing.assert_allclose(found, other, atol=1e-5)


def lowered(model, method, monkeypatch, tokens=272, packed=False, platform="cuda", implementation="cudnn"):
    """A whole training step on bfloat16 with remat, as StableHLO for a device that is not here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # of a library not here
    model = model.clone(config=replace(model.config, attn_implementation=implementation), dtype=jnp.bfloat16,
                        param_dtype=jnp.bfloat16, remat=True)
    params = jax.eval_shape(method.init, jax.random.key(0), abstract(model))
    trainable, frozen = partition(params, method.labels(params))
    tx = optax.adamw(1e-3)
    state = jax.eval_shape(lambda leaves: init_state(leaves, tx, jax.random.key(0)), trainable)
    step = make_step(bind(method, model), tx, loss_chunk=16)
    batch = batch_shapes(2, tokens, 5, packed=packed)
    return step.trace(state, frozen, batch).lower(lowering_platforms=(platform,)).as_text()


def squares(text, tokens=272):
    """Types of arrays that are ``tokens`` long or longer along two axes."""
    kinds = set(re.findall(r"tensor<((?:\d+x)+)\w+>", text))
    return {kind for kind in kinds if sum(int(size) >= tokens for size in kind.split("x")[:-1]) > 1}


STEPS = {
    "llama": (MODELS["llama"], lora(r=2)), "gpt2": (MODELS["gpt2"], lora(r=2, target_modules="all-linear")),
    "prompt tuning": (MODELS["llama"], prompt(7)), "P-tuning": (MODELS["mixed windows"], ptuning(7)),
    "prefix tuning": (MODELS["mixed windows"], prefix(7)), "one window": (MODELS["one window"], lora(r=2)),
    "mixed windows": (MODELS["mixed windows"], lora(r=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_rows_of_one_text_holds_no_square_on_a_gpu(name, monkeypatch):
    text = lowered(*STEPS[name], monkeypatch)
    assert "__cudnn$fmhaSoftmaxBackward" in text and "PADDING_CAUSAL" in text and not squares(text)
    windows = {int(size) for size in re.findall(r'sliding_window_length\\22: (\d+)', text)}
    assert windows == {"one window": {4}, "llama": {0}, "gpt2": {0}, "prompt tuning": {0}}.get(name, {0, 4})


@pytest.mark.slow
def test_a_step_of_packed_rows_does_and_so_does_the_plain_program(monkeypatch):
    assert squares(lowered(*STEPS["llama"], monkeypatch, packed=True))
    assert squares(lowered(*STEPS["llama"], monkeypatch, implementation="xla"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens", "packed"), [
    ("llama", 384, False), ("llama", 384, True), ("mixed windows", 384, True), ("prompt tuning", 377, False)])
def test_a_step_holds_no_square_on_a_tpu(name, tokens, packed, monkeypatch):
    text = lowered(*STEPS[name], monkeypatch, tokens, packed, "tpu", "splash")
    assert "tpu_custom_call" in text and not squares(text, tokens)


TPU = SimpleNamespace(platform="tpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")


@pytest.mark.parametrize(("device", "tokens", "mask", "chosen"), [
    (H100, 271, masks.RowMask(271, True), "cudnn"), (H100, 271, None, "xla"), (H100, 272, None, "cudnn"),
    (H100, 271, masks.RowMask(271, True, segment_ids=jnp.ones((2, 271))), "xla"), (H100, 1, None, "xla"),
    (TPU, 256, masks.RowMask(256, True), "splash"), (TPU, 256, None, "xla"),
    (TPU, 272, masks.RowMask(272, True), "xla"),
    (TPU, 256, masks.RowMask(256, True, segment_ids=jnp.ones((2, 256))), "splash"),
    (None, 256, masks.RowMask(256, True), "xla"),
])
def test_what_auto_is(device, tokens, mask, chosen):
    query = jax.ShapeDtypeStruct((2, tokens, 4, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((2, 1, tokens, tokens), bool) if mask is None else mask
    assert attention.choice(query, query, mask, device) == chosen
