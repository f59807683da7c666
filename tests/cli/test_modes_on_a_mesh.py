"""The jobs after training on a mesh of virtual devices: what they find, write and say is what one device does."""

import json

import jax
import numpy as np
import pytest

import run
from peft_jax.cli import trained_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_the_root")]
MESH = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


@pytest.fixture(scope="module", params=["lora", "full"])
def trained(request, tiny_folder, films, tmp_path_factory):
    """(flags of a finished run of one device but for the mesh, its workdir)."""
    settings = {"data.batch_size": 4, "optim.steps": 3, "optim.epochs": 0, "optim.accumulate_steps": 1,
                "optim.learning_rate": 1e-2, "model.dtype": "float32", "model.param_dtype": "float32",
                "eval.batch_size": 4, "eval.probe": "", "log.tensorboard": False, "task.prompt_column": "prompt",
                "task.completion_column": "completion", "task.validation_fraction": 0.2}  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / request.param
    command = [f"--config=experiments/{request.param}.py:model={tiny_folder},task={films(12)}", f"--workdir={folder}",
               *(f"--config.{key}={value}" for key, value in settings.items())]
    assert run.main([*command, "--config.mesh.data=1"]) == 0
    return command, folder


@pytest.fixture
def lying(monkeypatch):
    """How the weights lay that the job used: the most devices that share a leaf of them."""
    seen = []
    load = trained_run.load

    def look(*args):
        found = load(*args)
        seen.append(max(len(leaf.sharding.device_set) if not leaf.sharding.is_fully_replicated else 1
                        for leaf in jax.tree.leaves(found.params)))
        return found

    monkeypatch.setattr(trained_run, "load", look)
    return seen


def test_eval(trained, lying):
    command, folder = trained
    assert run.main([*command, *MESH, "--mode=eval"]) == 0
    found, results = (json.loads((folder / name).read_text()) for name in ("eval.json", "results.json"))
    after = next(found[name] for name in ("adapter", "model") if name in found)
    assert found["base"]["loss"] == pytest.approx(results["before"]["loss"], rel=1e-5)
    assert after["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)
    assert lying == [4]


def test_merge(trained, lying, tmp_path):
    from safetensors.numpy import load_file

    command, _ = trained
    for name, mesh in (("one", ["--config.mesh.data=1"]), ("four", MESH)):
        assert run.main([*command, *mesh, "--mode=merge", f"--output={tmp_path / name}"]) == 0
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    assert one.keys() == four.keys()
    for name, array in one.items():
        np.testing.assert_allclose(four[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
    assert lying == [1, 4]


def test_generate(trained, lying, capsys):
    command, _ = trained
    said = []
    for mesh in (["--config.mesh.data=1"], MESH):
        capsys.readouterr()
        assert run.main([*command, *mesh, "--mode=generate", "--prompt=a bright film is", "--prompt=a dull"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "base:" in said[0]
    assert lying == [1, 4]
