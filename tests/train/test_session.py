"""Whether examples fit the model, before it is loaded."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import base
from peft_jax import bind
from peft_jax.data import Encoded
from peft_jax.errors import PeftJaxError
from peft_jax.train import session
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
    session.check_fits([example([0, 9]), example([1, 2, 3, 4])], config)
    with pytest.raises(PeftJaxError, match="gives the id 10, but the model's vocabulary ends at 9"):
        session.check_fits([example([0, 9]), example([10])], config)
    with pytest.raises(PeftJaxError, match="has 5 tokens, but the model has 4 positions"):
        session.check_fits([example([1, 2, 3, 4, 5])], config)


@pytest.mark.parametrize("change, words", [({"vocab_size": 200}, "vocabulary ends at 199"),
                                           ({"max_position_embeddings": 5}, "the model has 5 positions")])
def test_a_session_stops_before_the_weights_are_read(tiny_folder, tmp_path, change, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(described))
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(PeftJaxError, match=words):
        session.load(configured(folder, tmp_path))


@pytest.mark.parametrize("content, words", [('{"vocab_size": ', "not readable"), ("[]", "holds no JSON object")])
def test_a_damaged_config_of_the_model_is_not_the_tokenizer_s_fault(tiny_folder, tmp_path, content, words):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "config.json").write_text(content)
    with pytest.raises(PeftJaxError, match=f"^{folder}/config.json .*{words}"):
        session.load(configured(folder, tmp_path))


def test_several_methods_are_built_into_one_chain(tiny_model):
    config = base.get_config(method="prefix+parallel_adapter")
    config.method.prefix.num_virtual_tokens = 3
    method = session.build_method(config)
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
        session.build_method(config)
