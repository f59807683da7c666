"""run.py's flags about devices and processes: what cannot be meant is one line, what is asked for is done."""

import os
import subprocess
import sys

import jax
import pytest

import run
from peft_jax import PeftJaxError
from peft_jax.cli import runtime

pytestmark = pytest.mark.usefixtures("at_the_root")
TWO = ["--distributed", "--num_processes=2", "--process_id=1"]


@pytest.mark.parametrize(("flags", "words"), [
    ([*TWO, "--coordinator=head"], "--coordinator=head: HOST:PORT"),
    ([*TWO, "--coordinator=head:"], "--coordinator=head:: HOST:PORT"),
    ([*TWO, "--coordinator=:29500"], "--coordinator=:29500: HOST:PORT"),
    ([*TWO, "--coordinator=head:2x"], "--coordinator=head:2x: HOST:PORT"),
    ([*TWO, "--coordinator=head:99999"], "--coordinator=head:99999: HOST:PORT"),
    ([*TWO, "--coordinator="], "--coordinator=: HOST:PORT"),
    (TWO, "goes with --coordinator"),
    (TWO[1:], "--num_processes is for several processes: add --distributed"),
    (["--distributed", "--coordinator=a:1", "--num_processes=0", "--process_id=0"], "--num_processes=0: at least 1"),
    (["--distributed", "--coordinator=a:1", "--num_processes=2", "--process_id=2"], "--process_id=2: from 0 to 1"),
    (["--distributed", "--mode=eval"], "--distributed is for --mode=train"),
    (["--profile=2", "--mode=eval"], "--profile is for --mode=train"),
    (["--transfer_guard=log", "--mode=merge"], "--transfer_guard is for --mode=train"),
    (["--profile=-1"], "--profile=-1: a number of training steps"),
    (["--transfer_guard=no"], "--transfer_guard=no"),
])
def test_what_cannot_be_meant_is_an_error(flags, words):
    with pytest.raises(PeftJaxError) as error:
        run.parse_command(["--config=experiments/lora.py", *flags])
    assert words in str(error.value)


@pytest.mark.parametrize("where", ["head:29500", "[::1]:29500", "10.0.0.1:1"])
def test_a_coordinator_is_a_host_and_a_port(where):
    assert run.parse_command(["--config=experiments/lora.py", *TWO, f"--coordinator={where}"]).coordinator == where


@pytest.fixture(scope="module")
def arguments(tiny_folder, films):
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 3, "eval.batch_size": 4, "eval.limit": 4,
                "eval.before": False, "eval.probe": "", "method.r": 4, "log.tensorboard": False,
                "task.prompt_column": "prompt", "task.completion_column": "completion",
                "task.validation_fraction": 0.2}  # fmt: skip
    return [f"--config=experiments/lora.py:model={tiny_folder},task={films(12)}",
            *(f"--config.{key}={value}" for key, value in settings.items())]


@pytest.mark.slow
def test_a_profile_of_more_steps_than_there_are_is_of_those(arguments, tmp_path, capsys):
    assert run.main([*arguments, f"--workdir={tmp_path}", "--profile=100"]) == 0
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    assert "no step was profiled" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_of_one_step_says_that_it_has_no_profile(arguments, tmp_path, capsys):
    assert run.main([*arguments, f"--workdir={tmp_path}", "--profile=1", "--config.optim.steps=1"]) == 0
    assert "no step was profiled" in capsys.readouterr().out and not (tmp_path / "profile").exists()


def test_cudnn_where_there_is_none_is_one_line(arguments, tmp_path, capsys):
    assert run.main([*arguments, f"--workdir={tmp_path}", "--config.model.attn_implementation=cudnn"]) == 2
    assert "attn_implementation='cudnn'" in capsys.readouterr().err.splitlines()[-1]


def test_an_accelerator_that_is_not_used_is_told():
    """Of a plugin that another jax was installed beside, as a pin of ours once did; and of a card without one."""
    assert runtime.unused_accelerator({}, []) is None
    told = runtime.unused_accelerator({"jax-cuda13-plugin": "0.1.0"}, ["an NVIDIA card"])
    assert f"jax-cuda13-plugin 0.1.0 is installed: it must be of jax's version, {jax.__version__}" in told
    assert "says why" in runtime.unused_accelerator({"jax-cuda13-plugin": jax.__version__}, [])
    assert "has an NVIDIA card: jax's plugin for it is not installed" in runtime.unused_accelerator({}, [
        "an NVIDIA card"])
    assert [runtime.PLUGIN.match(name) is not None for name in (
        "jax-cuda13-plugin", "jax_cuda12_plugin", "jax-rocm7-plugin", "libtpu", "jax-cuda13-pjrt", "jaxlib")] == [
        True, True, True, True, False, False]


@pytest.mark.slow
def test_the_line_comes_first(tiny_folder, films, tmp_path):
    """A plugin's name on the path is enough to be found; what JAX_PLATFORMS asks for is nobody's surprise."""
    plugin = tmp_path / "site" / "jax_cuda13_plugin-0.1.0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-plugin\nVersion: 0.1.0\n")
    command = [sys.executable, "run.py", f"--config=experiments/lora.py:model={tiny_folder},task={films(4)}",
               "--mode=generate", "--prompt=a", f"--workdir={tmp_path / 'run'}"]
    outputs = {}
    for platforms in ("", "cpu"):
        environment = {**os.environ, "JAX_PLATFORMS": platforms, "PYTHONPATH": str(plugin.parent)}
        outputs[platforms] = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    assert outputs[""].startswith("computing on the CPU, although jax-cuda13-plugin 0.1.0 is installed")
    assert "computing on the CPU" not in outputs["cpu"]


def test_a_program_that_a_killed_process_left_half_kept_goes(tmp_path, monkeypatch):
    """jax would fail on it whenever it looks which program was not used for longest."""
    monkeypatch.setenv("PEFT_JAX_CACHE", str(tmp_path))
    (tmp_path / "programs").mkdir()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (tmp_path / "programs" / name).write_bytes(b"x" * 8)
    (tmp_path / "compiled").mkdir()
    assert runtime._programs() == tmp_path / "programs"
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {
        "programs", "programs/whole-cache", "programs/whole-atime"}
