"""Adapters that would hang, or fill the memory: one line each, at once."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax import (  # fmt: skip
    PeftJaxError,
    load_adapter,
    load_config,
    load_pretrained,
    load_tokenizer,
    lora,
    save_adapter,
)

METHOD = lora(r=2, target_modules=["q_proj", "v_proj"])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def stored(tiny_model, tmp_path):
    save_adapter(tmp_path, METHOD, tiny_model[0], METHOD.init(jax.random.key(0), tiny_model[1]))
    return tmp_path


def restate(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(folder, base, why):
    with pytest.raises(PeftJaxError, match=why) as error:
        load_adapter(folder, base)
    assert "\n" not in str(error.value) and len(str(error.value)) < 2500


SLOW = r"(?:.*?.*?)*" * 50 + "x"
MANY = [str(number) for number in range(10**6)]
ODD = [
    ({"target_modules": MANY}, "target_modules of 1,000,000 entries"),
    ({"modules_to_save": MANY}, "modules_to_save of 1,000,000 entries"),
    ({"exclude_modules": MANY}, "exclude_modules of 1,000,000 entries"),
    ({"rank_pattern": dict.fromkeys(MANY[:10**5], 1)}, "rank_pattern of 100,000 entries"),
    ({"target_modules": "(" * 10**5}, "target_modules with '.*', which has 100000 characters"),
    ({"target_modules": "(" * 5000 + ")" * 5000}, "target_modules with '.*', which is no regular expression"),
    ({"exclude_modules": "((a{1000}){1000}){1000}"}, "exclude_modules with '.*', which repeats more than"),
    ({"rank_pattern": {"((a{1000}){1000}){1000}": 1}}, "rank_pattern with '.*', which repeats more than"),
    ({"lora_alpha": 10**400}, "lora_alpha=1000.*: give a finite number"),
    ({"lora_alpha": 1e39}, r"lora_alpha=1e\+39: give a finite number"),
    ({"lora_alpha": float("inf")}, "lora_alpha=inf: give a finite number"),
    ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern.*give a finite number"),
    ({"r": -1}, "r=-1: a rank is"),
    ({"r": 10**9}, "numbers to train"),
    ({"r": 10**400}, "numbers to train|of its fields"),
    ({"rank_pattern": {"q_proj": 10**30}}, "numbers to train|cannot be understood"),
    ({"use_rslora": None}, "use_rslora=None"),
    ({"peft_type": "x" * 10**6}, "is a 'xxx.*' adapter"),
    ({"peft_type": ["LORA"]}, "adapter, which cannot be loaded"),
    ({"peft_type": {"a": 1}}, "which cannot be loaded"),
    ({"peft_type": "CHAIN", "methods": [{"peft_type": "LORA"}] * 1000}, "a CHAIN whose 'methods'"),
    ({"peft_type": "CHAIN", "methods": {}}, "a CHAIN whose 'methods'"),
    ({"mystery": "x" * 10**6}, "asks for mystery="),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "why"), ODD, ids=[f"{changes}"[:50] for changes, _ in ODD])
def test_a_config_that_asks_for_too_much_is_named(stored, tiny_model, changes, why):
    restate(stored, **changes)
    refused(stored, tiny_model[1], why)


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("content", ["[]", "5", "", "{", '"LORA"', nested(10**5), f'{{"auto_mapping": {nested(900)}}}',
                                     f'{{"peft_type": {nested(900)}}}', '{"r": 8, "r": 9}', "\x00" * 100])
def test_a_config_that_is_none_is_one_line(stored, tiny_model, content):
    (stored / CONFIG).write_text(content)
    refused(stored, tiny_model[1], CONFIG)


@pytest.mark.slow
def test_a_pattern_that_would_never_end_is_named():
    """A user's own, too."""
    name = f"layers.0.self_attn.q_proj.{'a' * 30}{'x' * 30}!"
    params = {name: {"kernel": jnp.ones((4, 4))}}
    for changes in ({"target_modules": SLOW}, {"target_modules": [name], "rank_pattern": {SLOW: 1}}):
        with pytest.raises(PeftJaxError, match="takes over 1 s to be compared with"):
            lora(r=2, **changes).init(jax.random.key(0), params)


def test_a_list_of_many_names_is_looked_through_at_once(stored, tiny_model):
    restate(stored, target_modules=["q_proj", "v_proj", *MANY[:20_000]])
    assert set(load_adapter(stored, tiny_model[1])[0].config["target_modules"]) == {"q_proj", "v_proj"}


def test_a_file_of_holes_is_not_read(stored, tiny_model):
    """It says that it has tensors of a gigabyte, for a rank that fits them, and takes no place on the disk."""
    rank, header, at = 10**6, {}, 0
    for key, tensor in load_file(stored / WEIGHTS).items():
        shape = [rank if size == 2 else size for size in tensor.shape]
        end = at + 4 * int(np.prod(shape))
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(stored / WEIGHTS, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    restate(stored, r=rank)
    refused(stored, tiny_model[1], "numbers to train, and the model has")


def described(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HEADERS = [
    (2**63, {}, "its header would have"),
    (10**8, {}, "its header would have"),
    (1000, {}, "safetensors"),
    (None, [], "safetensors"),
    (None, {"a": 5}, "safetensors"),
    (None, {"a": described(dtype="X99")}, "safetensors"),
    (None, {"a": described(data_offsets=[0, 2**60])}, "safetensors"),
    (None, {"a": described(data_offsets=[8, 0])}, "safetensors"),
    (None, {"a": described(shape=[2**62, 8])}, "safetensors"),
    (None, {"a": described(shape=[-2])}, "safetensors"),
    (None, {"a": described(), "b": described()}, "safetensors"),
    (None, {"a": described(data_offsets=[4, 12])}, "safetensors"),
    (None, f'{{"a": {json.dumps(described())}, "a": {json.dumps(described(dtype="I32"))}}}', "'a' stands there twice"),
    (None, "[" * 10**5, "safetensors"),
    (None, "\xff", "safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "header", "why"), HEADERS, ids=[f"{one} {two}"[:50] for one, two, _ in HEADERS])
def test_a_header_that_lies_is_named(stored, tiny_model, size, header, why):
    text = header.encode("latin-1") if isinstance(header, str) else json.dumps(header).encode()
    (stored / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + bytes(8))
    refused(stored, tiny_model[1], f"{WEIGHTS}.*{why}")


@pytest.mark.parametrize(("dtype", "value", "why"), [
    (np.float64, 1e39, r"1 with values beyond the model's type: .*q_proj.lora_A.weight \(float32\)"),
    (np.float32, np.inf, "1 with NaN or infinite values"), (np.float64, np.nan, "1 with NaN or infinite values"),
])
def test_a_number_that_the_model_cannot_hold_is_named(stored, tiny_model, dtype, value, why):
    tensors = load_file(stored / WEIGHTS)
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    save_file({**tensors, key: np.full(tensors[key].shape, value, dtype)}, stored / WEIGHTS)
    refused(stored, tiny_model[1], why)


def test_a_number_beyond_the_half_precision_of_the_model_is_named(stored, tiny_model):
    tensors = load_file(stored / WEIGHTS)
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    save_file({**tensors, key: np.full_like(tensors[key], 1e5)}, stored / WEIGHTS)
    load_adapter(stored, tiny_model[1])
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), tiny_model[1])
    refused(stored, half, r"1 with values beyond the model's type: .* \(float16\)")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_what_is_no_file_is_not_opened(stored, tiny_model, name):
    (stored / name).unlink()
    os.mkfifo(stored / name)
    refused(stored, tiny_model[1], f"{name} is a named pipe")
    (stored / name).unlink()
    (stored / name).symlink_to("/dev/zero")
    refused(stored, tiny_model[1], f"{name} is a device")


@pytest.mark.parametrize("load", [lambda source: load_adapter(source, {"up": {"kernel": jnp.ones((2, 2))}}),
                                  load_config, load_pretrained, load_tokenizer])
def test_the_home_of_nobody_is_one_line(load):
    with pytest.raises(PeftJaxError, match="~nobody_of_this_name/model"):
        load("~nobody_of_this_name/model")
