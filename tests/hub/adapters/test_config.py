"""Fields of an adapter's config of another type than the method's argument, or that nobody can make sense of."""

import inspect
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax import PeftJaxError, adalora, full, houlsby, ia3, load_adapter, lora, save_adapter, trainable_tokens
from peft_jax.hub.adapters import config_types
from peft_jax.methods import formats

METHODS = {"lora": lora(r=2), "ia3": ia3(), "adalora": adalora(target_r=2, init_r=3, total_step=9, tfinal=1),
           "tokens": trainable_tokens((1, 4)), "houlsby": houlsby(bottleneck_size=2)}


@pytest.fixture(scope="module")
def kept(tiny_model, tmp_path_factory):
    """The folder in which an adapter of each method lies, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, method in METHODS.items():
        save_adapter(folder / name, method, tiny_model[0], method.init(jax.random.key(0), tiny_model[1]))
    return folder


@pytest.fixture
def restated(kept, tmp_path):
    """``(method's name, fields) -> folder``: the adapter with other fields, and the same tensors."""
    def change(name, changes):
        given = json.loads((kept / name / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**given, **changes}))
        (tmp_path / "adapter_model.safetensors").write_bytes((kept / name / "adapter_model.safetensors").read_bytes())
        return tmp_path
    return change


ODD = [
    ("lora", "use_rslora", "false", "'false', where true or false belongs"),
    ("lora", "use_rslora", 1, "1, where true or false belongs"),
    ("lora", "ensure_weight_tying", "false", "'false', where true or false"),
    ("lora", "use_dora", "false", "'false', where true or false"),
    ("lora", "r", True, "True, where a whole number belongs"),
    ("lora", "r", "8", "'8', where a whole number belongs"),
    ("lora", "r", 2.0, "2.0, where a whole number belongs"),
    ("lora", "lora_alpha", "16", "'16', where a number belongs"),
    ("lora", "bias", 3, "3, where a string belongs"),
    ("lora", "target_modules", [1, 2], r"\[1, 2\], where a string or a list of strings or null belongs"),
    ("lora", "target_modules", {"q_proj": 1}, "where a string or a list of strings"),
    ("lora", "target_modules", "(", "with '\\(', which is no regular expression"),
    ("lora", "modules_to_save", 5, "5, where a list of strings or null belongs"),
    ("lora", "modules_to_save", "norm", "'norm', where a list of strings or null belongs"),
    ("lora", "init_lora_weights", {"a": 1}, "where true or false or a string belongs"),
    ("lora", "alpha_pattern", [1], r"\[1\], where an object of numbers or null belongs"),
    ("lora", "rank_pattern", {"(": 1}, "with '\\(', which is no regular expression"),
    ("lora", "rank_pattern", {"q_proj": "2"}, "where an object of whole numbers"),
    ("lora", "layers_pattern", "(", "with '\\(', which is no regular expression"),
    ("lora", "layers_to_transform", ["0"], "where a whole number or a list of whole numbers"),
    ("tokens", "token_indices", None, "None, where a list of whole numbers belongs"),
    ("tokens", "token_indices", 1, "1, where a list of whole numbers belongs"),
    ("adalora", "rank_pattern", {"a": 3}, "where an object of lists or null belongs"),
    ("adalora", "rank_pattern", [3], "where an object of lists"),
    ("ia3", "feedforward_modules", 3, "3, where a string or a list of strings"),
    ("houlsby", "attention_modules", 3, "3, where a string or a list of strings"),
    ("houlsby", "leave_out", [None], "where a whole number or a list of whole numbers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "field", "value", "why"), ODD, ids=[f"{n} {f}={v}" for n, f, v, _ in ODD])
def test_a_field_of_another_type_is_named_with_its_file(restated, tiny_model, name, field, value, why):
    with pytest.raises(PeftJaxError, match=rf"adapter_config\.json has {field}\b.*{why}") as error:
        load_adapter(restated(name, {field: value}), tiny_model[1])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"lora_alpha": float("nan")}, {"r": 0}, {"lora_dropout": 2}, {"bias": "some"}])
def test_what_a_method_says_of_its_arguments_names_the_file(restated, tiny_model, changes):
    with pytest.raises(PeftJaxError, match=rf"adapter_config\.json.*{next(iter(changes))}"):
        load_adapter(restated("lora", changes), tiny_model[1])


@pytest.mark.parametrize("error", [TypeError("odd"), ValueError("odd"), KeyError("odd"), AttributeError("odd")])
def test_what_no_check_knows_names_the_file_and_its_fields(restated, tiny_model, monkeypatch, error):
    def odd(*given):
        raise error

    monkeypatch.setattr("peft_jax.hub.adapters.config.without_unmatched", odd)
    with pytest.raises(PeftJaxError, match=r"adapter_config\.json: its fields cannot be understood \(.*r int"):
        load_adapter(restated("lora", {}), tiny_model[1])


def test_patterns_of_a_full_method_in_a_chain_are_checked(restated, tiny_model):
    parts = [{"peft_type": "FULL", "patterns": 3}, {"peft_type": "IA3"}]
    with pytest.raises(PeftJaxError, match=r"has patterns=3, where a string or a list of strings belongs"):
        load_adapter(restated("ia3", {"peft_type": "CHAIN", "methods": parts}), tiny_model[1])
    assert full(patterns="norm").config["patterns"]


def test_the_defaults_of_every_method_pass(tmp_path):
    """And every annotation is one that the check knows and can say."""
    for form in formats():
        parameters = inspect.signature(form.make).parameters
        stated = {name: parameters[name].default for name in form.arguments if name in parameters}
        config_types.check(tmp_path, {name: list(value) if isinstance(value, tuple) else value
                                for name, value in stated.items()}, form.make)
        for name in stated:
            with pytest.raises(PeftJaxError, match=f"has {name}=<object"):
                config_types.check(tmp_path, {name: object()}, form.make)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, bool])
def test_tensors_that_are_no_floats_are_errors(restated, tiny_model, dtype):
    folder = restated("lora", {})
    tensors = load_file(folder / "adapter_model.safetensors")
    key = min(tensors)
    save_file({**tensors, key: tensors[key].astype(dtype)}, folder / "adapter_model.safetensors")
    with pytest.raises(PeftJaxError, match=rf"1 of no floating-point type: {key} is {np.dtype(dtype)}"):
        load_adapter(folder, tiny_model[1])


def test_tensors_of_a_type_that_numpy_lacks_are_an_error(restated, tiny_model):
    folder = restated("lora", {})
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))
    with pytest.raises(PeftJaxError, match=r"adapter_model\.safetensors has tensors of a type that cannot be read"):
        load_adapter(folder, tiny_model[1])


def test_float16_adapters_load(restated, tiny_model):
    folder = restated("lora", {})
    tensors = load_file(folder / "adapter_model.safetensors")
    halves = {key: tensor.astype(np.float16) for key, tensor in tensors.items()}
    save_file(halves, folder / "adapter_model.safetensors")
    assert load_adapter(folder, tiny_model[1])[1]["layers"]["self_attn"]["q_proj"]["lora_a"].dtype == np.float32
