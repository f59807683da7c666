"""Damaged and hostile files of tokenizers: one line each."""

import json
import os

import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.hub.tokenizer import load_tokenizer


@pytest.fixture
def saved(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def restate(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


ODD = [(field, value) for field, values in {
    "eos_token": (5, ["x"], True, {"x": 1}, {"content": 5}), "pad_token": (1.5, []),
    "additional_special_tokens": ("x", [5], [None]), "added_tokens_decoder": ([5], {"1": 5}, {"1": {"content": []}}),
    "add_bos_token": ("false", 1), "padding_side": ("middle", 3), "chat_template": (5, [5], {"default": 5}, True),
    "model_max_length": ("x", -1, True, 0, float("nan")), "tokenizer_class": (5, []),
}.items() for value in values]


@pytest.mark.parametrize(("field", "value"), ODD, ids=[f"{field}={value}" for field, value in ODD])
def test_a_field_of_another_type_is_named(saved, field, value):
    restate(saved / "tokenizer_config.json", **{field: value})
    with pytest.raises(PeftJaxError, match=rf"tokenizer_config\.json has {field}=.*, where .* belongs") as error:
        load_tokenizer(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["[]", "5", "{", '"x"', "[" * 10**5, '{"eos_token": "a", "eos_token": "b"}'])
def test_a_file_that_is_no_object_is_named(saved, name, content):
    (saved / name).write_text(content)
    with pytest.raises(PeftJaxError, match=name):
        load_tokenizer(saved)


@pytest.mark.parametrize("change", [
    lambda content: content[:-50], lambda content: "[]", lambda content: "{}", lambda content: "",
    lambda content: content.replace('"BPE"', '"BPF"'), lambda content: content.replace('"merges"', '"murges"'),
    lambda content: content.replace('"vocab"', '"vocap"'), lambda content: "[" * 10**5,
    lambda content: content.replace('"pre_tokenizer"', '"pre_tokenizer": 5, "x"')])
def test_a_damaged_vocabulary_is_one_line(saved, change):
    path = saved / "tokenizer.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(PeftJaxError, match=f"{saved} cannot be read as a tokenizer") as error:
        load_tokenizer(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json"])
def test_what_is_no_file_is_not_opened(saved, name):
    (saved / name).unlink(missing_ok=True)
    os.mkfifo(saved / name)
    with pytest.raises(PeftJaxError, match=f"{name} is a named pipe, not a file"):
        load_tokenizer(saved)


def test_a_special_token_beyond_the_model_is_named(saved, tiny_tokenizer):
    restate(saved / "config.json", model_type="llama", vocab_size=len(tiny_tokenizer))
    load_tokenizer(saved)
    restate(saved / "tokenizer_config.json", eos_token="<|another|>")
    with pytest.raises(PeftJaxError, match=r"has the eos_token '<.another.>' of number \d+, and the model"):
        load_tokenizer(saved)
