import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import PeftJaxError, Sampling, bind, generate, lora
from peft_jax.evaluation.generation import draw

SIZES = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
NEW = 12
# Mistral: every layer sees 5 tokens. Qwen2: only its last layer does.
KINDS = {
    "llama": ("Llama", {}),
    "windowed": ("Mistral", {"sliding_window": 5, "head_dim": 8}),
    "one layer windowed": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(torch model, Flax model, params)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind, options = KINDS[request.param]
    sizes = {"vocab_size": 53} if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options}, attn_implementation="eager",
                                                    bos_token_id=1, eos_token_id=2, pad_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.3)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, *peft_jax.load_pretrained(folder)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of 9, 5 and 2 tokens, padded on the left."""
    ids, mask = np.random.default_rng(0).integers(3, 53, (3, 9)), np.ones((3, 9), np.int64)
    for row, padding in enumerate([0, 4, 7]):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def greedy(pair, prompts, stop_ids, new=NEW):
    _, model, params = pair
    return generate(model.apply, model, params, *prompts, max_new_tokens=new, stop_ids=stop_ids)


@pytest.mark.slow
def test_greedy_equals_transformers_generate(pair, prompts):
    """21 tokens, four times the window, so that the cache's far end must be out of sight."""
    import torch

    theirs, _, _ = pair
    ids, mask = prompts
    with torch.no_grad():
        out = theirs.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=NEW, do_sample=False,
                              eos_token_id=None, pad_token_id=0)  # fmt: skip
    np.testing.assert_array_equal(greedy(pair, prompts, stop_ids=(53,)), out[:, ids.shape[1]:])


@pytest.mark.slow
def test_cached_decoding_equals_the_full_forward(pair, prompts):
    _, model, params = pair
    ids, mask = prompts
    full = np.asarray(model.apply({"params": params}, ids, mask))
    cache, parts = model.init_cache(3, 9), []
    step = jax.jit(lambda cache, *inputs: model.apply({"params": params, "cache": cache}, *inputs, mutable=["cache"]))
    for piece in (slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)):
        logits, held = step(cache, ids[:, piece], mask[:, piece])
        cache = held["cache"]
        parts.append(logits)
    real = mask.astype(bool)
    error = np.abs(np.concatenate(parts, axis=1) - full)[real]
    assert error.max() <= 1e-4 * np.abs(full[real]).max()


def test_a_row_ends_at_its_stop_token_and_others_go_on(pair, prompts):
    free = greedy(pair, prompts, stop_ids=(53,))
    stop = int(free[0, 3])
    stopped = greedy(pair, prompts, stop_ids=(stop, 52))
    for row, tokens in enumerate(free):
        ends = np.flatnonzero(np.isin(tokens, (stop, 52)))
        length = ends[0] + 1 if len(ends) else NEW
        np.testing.assert_array_equal(stopped[row, :length], tokens[:length])
        assert (stopped[row, length:] == stop).all()


@pytest.mark.slow
def test_a_prompt_alone_gives_what_it_gives_in_a_batch(pair, prompts):
    ids, mask = prompts
    alone = greedy(pair, (ids[2:, 7:], mask[2:, 7:]), stop_ids=(53,))
    np.testing.assert_array_equal(alone[0], greedy(pair, prompts, stop_ids=(53,))[2])


@pytest.mark.slow
def test_a_bound_adapter_generates_as_its_merged_weights(tiny_model):
    model, base = tiny_model
    method = lora(r=4, target_modules="all-linear", init_lora_weights=False)
    params = method.init(jax.random.key(0), base)
    ids, mask = np.array([[5, 6, 7, 8]]), np.ones((1, 4), int)
    options = {"max_new_tokens": 8, "stop_ids": (0,)}
    tuned = generate(bind(method, model), model, params, ids, mask, **options)
    np.testing.assert_array_equal(tuned, generate(model.apply, model, method.merge(params), ids, mask, **options))
    assert not np.array_equal(tuned, generate(model.apply, model, base, ids, mask, **options))


PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.06, 0.04])


def frequencies(sampling, draws=20000):
    logits = jnp.log(jnp.asarray(PROBABILITIES))[None].repeat(draws, 0)
    return np.bincount(np.asarray(draw(logits, jax.random.key(0), sampling)), minlength=5) / draws


@pytest.mark.parametrize(("sampling", "kept", "power"), [
    (Sampling(1.0), 5, 1.0), (Sampling(2.0), 5, 0.5), (Sampling(1.0, top_k=2), 2, 1.0),
    (Sampling(1.0, top_k=99), 5, 1.0),
    (Sampling(1.0, top_p=0.65), 2, 1.0), (Sampling(1.0, top_p=0.75), 3, 1.0), (Sampling(1.0, top_p=0.01), 1, 1.0),
    (Sampling(0.5, top_k=3, top_p=0.9), 3, 2.0),
])  # fmt: skip
def test_draws_follow_the_cut_distribution(sampling, kept, power):
    expected = np.where(np.arange(5) < kept, PROBABILITIES**power, 0)
    expected = expected / expected.sum()
    found = frequencies(sampling)
    assert not found[kept:].any()
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 20000))


@pytest.mark.slow
def test_cuts_follow_each_rows_own_order():
    logits = jnp.log(jnp.asarray(np.stack([PROBABILITIES, PROBABILITIES[::-1]])))
    rows = [np.asarray(draw(logits, jax.random.key(i), Sampling(1.0, top_p=0.65))) for i in range(50)]
    assert set(np.array(rows)[:, 0]) == {0, 1} and set(np.array(rows)[:, 1]) == {3, 4}


def test_sampling_follows_its_key(tiny_model):
    model, params = tiny_model
    ids, mask = np.array([[5, 6, 7, 8]]), np.ones((1, 4), int)
    one, same, other = (generate(model.apply, model, params, ids, mask, max_new_tokens=8, stop_ids=(0,),
                                 sampling=Sampling(1.5), rng=jax.random.key(seed)) for seed in (0, 0, 1))  # fmt: skip
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize(("changes", "message"), [
    ({"attention_mask": np.array([[1, 1, 0]])}, "padded on the left"),
    ({"input_ids": np.zeros((0, 3), int), "attention_mask": np.zeros((0, 3), int)}, "none may be empty"),
    ({"max_new_tokens": 254}, "3 prompt tokens and 254 new ones are more than the model's 256 positions"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"stop_ids": ()}, r"stop_ids=\(\)"),
    ({"sampling": Sampling(1.0, top_p=0.0), "rng": jax.random.key(0)}, r"top_p=0\.0"),
    ({"sampling": Sampling(-1.0), "rng": jax.random.key(0)}, r"temperature=-1\.0"),
    ({"sampling": Sampling(1.0)}, r"rng=jax\.random\.key"),
    ({"input_ids": np.array([[1, 320, 3]])}, "input_ids has 320, the vocabulary is 0 to 319"),
    ({"input_ids": np.array([[-1, 2, 3]])}, "input_ids has -1"), ({"input_ids": np.array([[0.5, 2, 3]])}, "float64"),
    ({"input_ids": np.arange(3), "attention_mask": np.ones(3, int)}, r"int64 \(3,\) and .*integers \(batch, seq\)"),
    ({"input_ids": np.ones((1, 2), int)}, r"\(1, 2\) and attention_mask \(1, 3\)"),
    ({"max_new_tokens": 2.5}, r"max_new_tokens=2\.5"), ({"stop_ids": 1}, "stop_ids=1: give token ids"),
    ({"stop_ids": None}, "stop_ids=None"), ({"stop_ids": (None,)}, r"stop_ids=\(None,\)"),
])  # fmt: skip
def test_arguments_that_cannot_work_are_errors(tiny_model, changes, message):
    model, params = tiny_model
    options = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.ones((1, 3), int), "max_new_tokens": 2,
               "stop_ids": (0,), **changes}  # fmt: skip
    with pytest.raises(PeftJaxError, match=message):
        generate(model.apply, model, params, **options)


def test_an_encoder_writes_no_text(encoder_bases):
    _, model, params = encoder_bases("BertModel")
    with pytest.raises(PeftJaxError, match="this Encoder has no cache: only a decoder writes text"):
        generate(model.apply, model, params, np.ones((1, 3), int), np.ones((1, 3), int), max_new_tokens=2,
                 stop_ids=(0,))


def test_a_cache_that_is_too_short_is_an_error(tiny_model):
    model, params = tiny_model
    with pytest.raises(PeftJaxError, match="the cache holds 2 tokens a row"):
        model.apply({"params": params, "cache": model.init_cache(1, 2)}, jnp.ones((1, 3), int), mutable=["cache"])


@pytest.mark.slow
def test_a_full_cache_never_gives_a_wrong_number(tiny_model):
    """Token by token: an error where the fill is known, NaN where it is traced, the full forward's values before."""
    model, params = tiny_model
    ids = jnp.array([[5, 6, 7]])

    def step(cache, token):
        logits, held = model.apply({"params": params, "cache": cache}, token, mutable=["cache"])
        return held["cache"], logits

    def feed(step):
        cache, found = model.init_cache(1, 2), []
        for at in range(3):
            cache, logits = step(cache, ids[:, at:at + 1])
            found.append(logits)
        return np.concatenate(found, axis=1)

    with pytest.raises(PeftJaxError, match="2 are in it and 1 more came"):
        feed(step)
    found, full = feed(jax.jit(step)), model.apply({"params": params}, ids)
    np.testing.assert_allclose(found[:, :2], full[:, :2], rtol=1e-4, atol=1e-5)
    assert np.isnan(found[:, 2]).all()
