"""Whether examples fit the model, before it is loaded."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import base
from peft_jax import bind, chain, lora, prefix, quantize
from peft_jax.cli.build_method import build_method
from peft_jax.cli.checks import check_codes, check_fits
from peft_jax.cli.session import load_session
from peft_jax.core import files
from peft_jax.data import Encoded
from peft_jax.data.labelled import Labelled
from peft_jax.errors import PeftJaxError
from peft_jax.hub import model_files
from peft_jax.method import BASE
from tests import properties


def example(ids):
    return Encoded(np.array(ids, np.int32), np.ones(len(ids), bool), 0)


def configured(model, folder):
    """A configuration of this model and of a few films written to this folder."""
    rows = [json.dumps({"prompt": f"the film number {i} is", "completion": " good"}) for i in range(20)]
    (folder / "films.jsonl").write_text("\n".join(rows))
    config = base.get_config(model=str(model), task=str(folder / "films.jsonl"))
    config.task.update(prompt_column="prompt", completion_column="completion", validation_fraction=0.3)
    return config


def test_ids_and_lengths_up_to_the_model_s_own_are_welcome_and_one_more_is_not(tiny_model):
    config = dataclasses.replace(tiny_model[0].config, vocab_size=10, max_position_embeddings=4)
    check_fits([example([0, 9]), example([1, 2, 3, 4])], config)
    with pytest.raises(PeftJaxError, match="gives the id 10, but the model's vocabulary ends at 9"):
        check_fits([example([0, 9]), example([10])], config)
    with pytest.raises(PeftJaxError, match="has 5 tokens, but the model has 4 positions"):
        check_fits([example([1, 2, 3, 4, 5])], config)


@pytest.mark.parametrize("change, words", [({"vocab_size": 200}, "vocabulary ends at 199"),
                                           ({"max_position_embeddings": 5}, "the model has 5 positions")])
def test_a_session_stops_before_the_weights_are_read(tiny_folder, tmp_path, change, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(described))
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(PeftJaxError, match=words):
        load_session(configured(folder, tmp_path))


def test_a_session_reads_the_model_s_config_once_and_gives_it_its_head_once(tiny_folder, tmp_path, monkeypatch):
    """Besides the tokenizer, which looks whether config.json is one."""
    reads, heads, read_json, with_head = [], [], files.read_json, model_files.with_head
    monkeypatch.setattr(files, "read_json", lambda path, *more, **named: reads.append(path) or
                        read_json(path, *more, **named))
    monkeypatch.setattr(model_files, "with_head", lambda config, head: heads.append(head) or with_head(config, head))
    load_session(configured(tiny_folder, tmp_path))
    assert [path for path in reads if path.name == "config.json"] == [tiny_folder / "config.json"] * 2
    assert heads == [None]


@pytest.mark.parametrize("content, words", [('{"vocab_size": ', "not readable"), ("[]", "not a JSON object")])
def test_a_damaged_config_of_the_model_is_not_the_tokenizer_s_fault(tiny_folder, tmp_path, content, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(PeftJaxError, match=f"^{folder}/config.json .*{words}"):
        load_session(configured(folder, tmp_path))


@pytest.mark.slow
def test_several_methods_are_built_into_one_chain(tiny_model):
    config = base.get_config(method="prefix+parallel_adapter")
    config.method.prefix.num_virtual_tokens = 3
    method = build_method(config)
    assert [part.config["peft_type"] for part in method.parts] == ["PREFIX_TUNING", "BOTTLENECK"]
    params = method.init(jax.random.key(0), tiny_model[1])
    core = params["layers"]["self_attn"]["core"]
    assert core["prefix"].shape[:2] == (2, 3)
    before, after = (np.asarray(bind(method, tiny_model[0])({"params": tree}, np.arange(8)[None]))
                     for tree in (params, properties.moved(method, params)))
    assert np.abs(before - after).max() > 1e-2
    with pytest.raises(PeftJaxError, match="did you mean lora"):
        config.method.unlock()
        config.method.prefix.name = "lorra"
        build_method(config)


def test_a_text_becomes_the_ids_that_a_method_starts_from(tiny_model, tiny_folder, tiny_tokenizer):
    """As in peft: the tokenizer's ids, repeated or cut to as many as there are virtual tokens."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    text = "the film is good"
    ids = tiny_tokenizer(text)["input_ids"]
    config = base.get_config(model=str(tiny_folder), method="prompt+ia3")
    config.method.prompt.update(num_virtual_tokens=7, prompt_tuning_init="TEXT", prompt_tuning_init_text=text)
    prompt, _ = build_method(config).parts
    assert prompt.config["prompt_tuning_init_ids"] == tuple(ids) and len(ids) != 7
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tiny_folder), peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=7, prompt_tuning_init="TEXT", prompt_tuning_init_text=text,
            tokenizer_name_or_path=str(tiny_folder))).prompt_encoder["default"].embedding.weight.detach().numpy()
    held = prompt.init(jax.random.key(0), tiny_model[1])["embed_tokens"]["prompt"]
    np.testing.assert_array_equal(held, theirs)
    config.method.prompt.prompt_tuning_init_ids = (1, 2)
    with pytest.raises(PeftJaxError, match="both prompt_tuning_init_text and prompt_tuning_init_ids"):
        build_method(config)


def test_virtual_tokens_take_positions(tiny_model):
    encoded = [Labelled(np.zeros(250, np.int32), 0)]
    check_fits(encoded, tiny_model[0].config, chain(lora(), prefix(7, shift_positions=False)))
    check_fits(encoded, tiny_model[0].config, prefix(6))
    with pytest.raises(PeftJaxError, match="250 tokens and the method puts 7 in front, but the model has 256"):
        check_fits(encoded, tiny_model[0].config, chain(lora(), prefix(7)))


@pytest.mark.slow
def test_only_codes_that_can_be_saved_are_merged_into_again(tiny_model):
    for method, words in ((BASE, "is not quantised: leave it out"), (quantize("int8"), "is int8 in blocks of 64"),
                          (quantize(block_size=None), "in one block a row, .* Or leave --requantize out")):
        with pytest.raises(PeftJaxError, match=f"--requantize: .*{words}"):
            check_codes(method.init(None, tiny_model[1]))
    check_codes(quantize().init(None, tiny_model[1]))
