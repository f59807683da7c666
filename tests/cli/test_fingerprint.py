"""A run goes on with the data and the weights that it began with, or not at all."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import run
from peft_jax import quantize_array
from peft_jax.cli import fingerprint
from peft_jax.data import Encoded
from peft_jax.errors import PeftJaxError
from peft_jax.hub.load import load_pretrained
from peft_jax.hub.save import save_pretrained

BASE = {"layers": {"q_proj": {"kernel": jnp.arange(12.0).reshape(3, 4)}}, "head": {"kernel": jnp.ones((4, 2))}}


def examples(*lengths):
    return [Encoded(np.arange(n, dtype=np.int32), np.arange(n) > 1, i) for i, n in enumerate(lengths)]


def test_what_is_the_same_goes_on(tmp_path):
    fingerprint.settle(tmp_path, examples(3, 5), BASE)
    fingerprint.settle(tmp_path, examples(3, 5), {name: dict(part) for name, part in BASE.items()})


@pytest.mark.parametrize("other", [examples(3, 5, 5), examples(5, 3), [examples(3)[0], examples(5)[0]._replace(
    example=1, loss_mask=np.ones(5, bool))]], ids=["more", "another order", "another mask"])
def test_other_examples_are_refused(tmp_path, other):
    fingerprint.settle(tmp_path, examples(3, 5), BASE)
    with pytest.raises(PeftJaxError, match=rf"began with other training examples \(2 then, {len(other)} now\): .*--ov"):
        fingerprint.settle(tmp_path, other, BASE)


def test_other_weights_are_refused_by_name(tmp_path):
    fingerprint.settle(tmp_path, examples(3), BASE)
    other = {**BASE, "head": {"kernel": BASE["head"]["kernel"].at[3, 1].set(1.0000001)}}
    with pytest.raises(PeftJaxError, match=r"other base weights \(\['head'\]\['kernel'\] changed\)"):
        fingerprint.settle(tmp_path, examples(3), other)
    with pytest.raises(PeftJaxError, match=r"other base weights \(.*codes.* and .* more changed\)"):
        fingerprint.settle(tmp_path, examples(3), {"head": {"kernel": quantize_array(jnp.ones((64, 2)))}})


@pytest.mark.slow
@pytest.mark.usefixtures("at_the_root")
def test_a_run_whose_data_or_base_changed_is_not_resumed(tiny_folder, films, tmp_path, capsys):
    model, data, folder = shutil.copytree(tiny_folder, tmp_path / "model"), films(6), tmp_path / "run"
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 1, "eval.before": False, "eval.limit": 2,
                "eval.probe": "", "log.tensorboard": False, "task.prompt_column": "prompt",
                "task.completion_column": "completion"}  # fmt: skip
    command = [f"--config=experiments/lora.py:model={model},task={data}", f"--workdir={folder}",
               *(f"--config.{key}={value}" for key, value in settings.items())]
    assert run.main(command) == 0
    (folder / "results.json").unlink()  # as if it had been stopped before
    text = data.read_text()
    data.write_text(text.replace("bright", "lovely"))
    assert run.main(command) == 2
    assert "other training examples" in capsys.readouterr().err
    data.write_text(text)
    flax_model, params = load_pretrained(model)
    save_pretrained(model, flax_model, {**params, "norm": {"scale": params["norm"]["scale"] * 1.01}})
    assert run.main(command) == 2
    assert "other base weights (['norm']['scale'] changed)" in capsys.readouterr().err
    shutil.copytree(tiny_folder, model, dirs_exist_ok=True)
    assert run.main(command) == 0
