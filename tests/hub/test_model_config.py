import dataclasses

import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.hub import model_config
from peft_jax.hub.families.llama import ARCHITECTURES

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 4}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(kind="llama", **options):
    return model_config.from_hf({"model_type": kind, **SIZES, **options})


CASES = {
    "llama": {}, "llama3": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"kind": "mistral", "sliding_window": 8, "num_key_value_heads": 2},
    "mistral-full": {"kind": "mistral", "sliding_window": None, "num_key_value_heads": None},
    "qwen2": {"kind": "qwen2"},
    "qwen2-window": {"kind": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"kind": "qwen3", "head_dim": 16, "attention_bias": True},
}


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_back_what_is_written(name):
    transformers = pytest.importorskip("transformers")
    config = read(**CASES[name])
    written = model_config.to_hf(config)
    theirs = getattr(transformers, written["architectures"][0].replace("ForCausalLM", "Config"))(**written)
    assert model_config.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize("options", [{}, CASES["llama3"]])
def test_old_readers_find_the_rope_parameters_too(options):
    written = model_config.to_hf(read(**options))
    old = {key: value for key, value in written.items() if key != "rope_parameters"}
    new = {key: value for key, value in written.items() if key not in ("rope_theta", "rope_scaling")}
    assert model_config.from_hf(old) == model_config.from_hf(new) == read(**options)


def test_keys_left_out_mean_what_they_mean_to_transformers():
    transformers = pytest.importorskip("transformers")
    for kind, name in ARCHITECTURES.items():
        sizes = {key: size for key, size in SIZES.items() if key != "num_key_value_heads"}
        sizes |= {"hidden_size": 64, "num_attention_heads": 32 if kind.startswith("qwen") else 8}
        theirs = getattr(transformers, name.replace("ForCausalLM", "Config"))(**sizes)
        assert model_config.from_hf({"model_type": kind, **sizes}) == model_config.from_hf(theirs.to_dict())


BERT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
DISTIL = {"vocab_size": 97, "dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4}
OTHERS = {"Bert": BERT, "Roberta": BERT, "DistilBert": DISTIL,
          "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4}}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_read_what_transformers_means_and_write_what_it_reads(name):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{name}Config")(**OTHERS[name])
    config = model_config.from_hf({"model_type": name.lower(), **OTHERS[name]})
    assert config == model_config.from_hf(theirs.to_dict())
    assert model_config.from_hf(type(theirs)(**model_config.to_hf(config)).to_dict()) == config


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
    ("bert", {"is_decoder": True}, "is_decoder=True is not supported"),
    ("roberta", {"hidden_act": "gelu_fast"}, "hidden_act 'gelu_fast' is not supported in a roberta model"),
    ("gpt2", {"vocab_size": 97, "n_embd": 32, "n_layer": 4}, "the gpt2 config lacks n_head"),
    ("gpt2", {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 5}, "cannot be cut into 5 heads"),
    ("bert", {"num_attention_heads": 5}, "cannot be cut into 5 heads"),
    ("bert", {"architectures": "BertModel"}, "architectures='BertModel', where a list belongs"),
    ("bert", {"id2label": 3}, "id2label=3, where an object belongs"),
])
def test_what_other_families_cannot_read_is_named(kind, options, message):
    with pytest.raises(PeftJaxError, match=message):
        model_config.from_hf({"model_type": kind, **(options if kind == "gpt2" else {**BERT, **options})})


def test_the_old_word_for_the_rope_type():
    config = read(rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_scaling == (("factor", 2.0), ("rope_type", "linear"))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_qwen_s_key_value_heads_are_32_where_they_are_left_out(kind):
    """As transformers has it, whatever the number of heads is; where it is null they are as many as the heads."""
    sizes = {key: size for key, size in SIZES.items() if key != "num_key_value_heads"}
    with pytest.raises(PeftJaxError, match="num_attention_heads=4, no multiple of num_key_value_heads=32"):
        model_config.from_hf({"model_type": kind, **sizes})
    assert model_config.from_hf({"model_type": kind, **sizes, "num_key_value_heads": None}).num_key_value_heads == 4


def test_windows_only_where_they_are_used():
    assert read("qwen2", sliding_window=8).sliding_layers == ()
    assert read("qwen2", use_sliding_window=True, max_window_layers=3).sliding_layers == (False, False, False, True)
    types = ["sliding_attention", "full_attention"] * 2
    assert read("qwen3", use_sliding_window=True, layer_types=types).sliding_layers == (True, False, True, False)


def test_an_architecture_alone_is_enough():
    assert model_config.from_hf({"architectures": ["Qwen2ForCausalLM"], **SIZES}).model_type == "qwen2"


@pytest.mark.parametrize(("given", "message"), [
    ({"model_type": "mistrall", **SIZES}, r"model_type 'mistrall' is not supported: did you mean mistral\?"),
    ({**SIZES}, "names no model_type"),
    ({"model_type": "llama", "vocab_size": 3}, "lacks hidden_size, intermediate_size"),
    ({"model_type": "llama", **SIZES, "hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
    ({"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "linear"}}, "rope scaling 'linear' lacks factor"),
    ({"model_type": "llama", **SIZES, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"model_type": "qwen3", **SIZES, "layer_types": ["chunked_attention"] * 4}, "layer_types must say"),
    ({"model_type": ["llama"], **SIZES}, "is not supported"),
    ({"architectures": 5, **SIZES}, "names no model_type"),
    ({"model_type": "llama", **SIZES, "hidden_size": "32"}, "hidden_size='32', where a whole number from 1 to"),
    ({"model_type": "llama", **SIZES, "num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000, where a whole"),
    ({"model_type": "llama", **SIZES, "vocab_size": 0}, "vocab_size=0, where"),
    ({"model_type": "llama", **SIZES, "max_position_embeddings": None}, "max_position_embeddings=None, where"),
    ({"model_type": "llama", **SIZES, "num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
    ({"model_type": "llama", **SIZES, "head_dim": 7}, "an odd number of values"),
    ({"model_type": "llama", **SIZES, "num_attention_heads": 5}, "cannot be cut into 5 heads"),
    ({"model_type": "llama", **SIZES, "rope_scaling": "linear"}, "rope_scaling='linear', where an object belongs"),
    ({"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "linear", "factor": "2"}}, "lacks factor"),
    ({"model_type": "llama", **SIZES, "rope_theta": "x"}, "rope_theta='x', where a number belongs"),
    ({"model_type": "llama", **SIZES, "tie_word_embeddings": "false"}, "where true or false belongs"),
])
def test_what_cannot_be_read_is_named(given, message):
    with pytest.raises(PeftJaxError, match=message):
        model_config.from_hf(given)


def test_a_config_that_its_type_cannot_say_is_not_written():
    with pytest.raises(PeftJaxError, match="cannot be written as a 'llama'"):
        model_config.to_hf(dataclasses.replace(read(), qk_norm=True))


@pytest.mark.parametrize("chosen", ["xla", "cudnn"])
def test_which_program_computes_attention_is_no_part_of_it(chosen):
    config = read()
    assert model_config.to_hf(dataclasses.replace(config, attn_implementation=chosen)) == model_config.to_hf(config)


def test_a_folder_without_a_readable_config_is_named(tmp_path):
    with pytest.raises(PeftJaxError, match=r"has no config.json"):
        model_config.read(tmp_path)
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(PeftJaxError, match=r"it holds model.gguf, name that file"):
        model_config.read(tmp_path)
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(PeftJaxError, match="not readable as JSON"):
            model_config.read(tmp_path)


ODD = [  # (model type, fields, what is said)
    *[("llama", {"rms_norm_eps": value}, "rms_norm_eps=.*, where a number from 0 to 1 belongs")
      for value in (float("nan"), float("inf"), -1e-6, 10**400, True, "1e-6", [1])],
    *[("llama", {"num_hidden_layers": value}, "where a whole number from 1 to 10000 belongs")
      for value in (10**6, 0, -1, True, 2.0, "2", None)],
    *[("llama", {"vocab_size": value}, "vocab_size=.*, where a whole number from 1 to 16777216")
      for value in (10**12, 0)],
    ("llama", {"num_attention_heads": 0}, "num_attention_heads=0, where"),
    ("llama", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads=3"),
    *[("llama", {"rope_theta": value}, "rope_theta") for value in (0, -1.0, float("nan"), float("inf"), 10**400, True)],
    *[("llama", {"rope_parameters": value}, "rope") for value in (
        5, "x", {"rope_type": []}, {"rope_type": {}}, {"rope_theta": "x"}, {"rope_theta": [1]},
        {"rope_type": "linear", "factor": 0}, {"rope_type": "linear", "factor": float("nan")},
        {"rope_type": "linear", "factor": True}, {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0},
        {"rope_type": "llama3", **LLAMA3, "factor": None})],
    ("llama", {"rope_parameters": {"partial_rotary_factor": [2]}}, r"partial_rotary_factor \[2\] is not supported"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
     "say two things of the rotary positions"),
    *[("qwen3", {"use_sliding_window": True, "layer_types": value}, "layer_types")
      for value in ("x", [[]], [{}], [1], ["full_attention"], {"a": 1})],
    *[("qwen2", {"use_sliding_window": True, "sliding_window": value}, "sliding_window=")
      for value in (0, -4, True, "4")],
    ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers=-1"),
    *[("bert", {"architectures": value}, "architectures=.*, where a list belongs") for value in ([5], [None], [["x"]])],
    ("bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
    ("bert", {"type_vocab_size": -1}, "type_vocab_size=-1"),
    ("bert", {"architectures": ["BertForSequenceClassification"], "pooling": "middle"}, "pooling 'middle' is not"),
    ("roberta", {"pad_token_id": None}, "pad_token_id=None"),
    ("roberta", {"pad_token_id": -3}, "pad_token_id=-3"),
    ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings=2 and pad_token_id=1"),
    ([], {}, r"model_type '\[\]' is not supported"),
    ({"a": []}, {}, "is not supported"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), ODD, ids=[f"{kind} {fields}"[:60] for kind, fields, _ in ODD])
def test_what_no_model_can_have_is_named(kind, fields, message):
    with pytest.raises(PeftJaxError, match=message) as error:
        model_config.from_hf({"model_type": kind, **SIZES, **fields})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_architectures_that_are_no_names_name_no_type():
    for value in (5, [5], [["x"]], {"a": 1}, None):
        with pytest.raises(PeftJaxError, match="names no model_type"):
            model_config.from_hf({"architectures": value, **SIZES})
