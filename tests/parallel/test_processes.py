"""Two real processes train one run over jax.distributed on loopback; killed or told to stop, they end alike."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import run
from peft_jax.train.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_the_root")]


@pytest.fixture(scope="module")
def arguments(tiny_folder, films):
    settings = {"data.batch_size": 8, "data.collate": "pad", "optim.steps": 12, "optim.learning_rate": 1e-2,
                "checkpoint.every": 2, "eval.batch_size": 8, "eval.limit": 8, "eval.probe": "", "method.r": 4,
                "log.tensorboard": False, "task.prompt_column": "prompt", "task.completion_column": "completion",
                "task.validation_fraction": 0.2, **{f"mesh.{name}": size for name, size in MESH.items()}}
    return [f"--config=experiments/lora.py:model={tiny_folder},task={films(30)}",
            *[f"--config.{key}={value}" for key, value in settings.items()]]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The workdir of the same run in one process with all eight devices, never interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    return folder


def start(arguments, folder, second=()):
    """Both processes, four devices each; the second one with flags of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")}
    return [subprocess.Popen([sys.executable, "run.py", *arguments, f"--workdir={folder}", "--distributed",
                              f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}",
                              *(second if number else ())],
                             cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for number in range(2)]


def wait_for_step(processes, folder, step, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if any(row["step"] >= step for row in read_metrics(folder / "metrics.jsonl")):
            return
        assert all(one.poll() is None for one in processes), [one.communicate() for one in processes]
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


def ended(processes, seconds=240):
    """[(exit code, output, errors)]"""
    told = [one.communicate(timeout=seconds) for one in processes]
    return [(one.returncode, *words) for one, words in zip(processes, told)]


def same_end(folder, alone):
    one, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, alone))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        np.testing.assert_allclose(one[name], tensor, atol=1e-4, err_msg=name)  # a hundredth of the learning rate
    found, wanted = (json.loads((f / "results.json").read_text()) for f in (folder, alone))
    for when in ("before", "after"):
        assert found[when] == pytest.approx(wanted[when], rel=1e-4)
    losses = [[row["loss"] for row in read_metrics(f / "metrics.jsonl")] for f in (folder, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_killed_in_a_step_they_go_on_and_end_as_if_nothing_had_been(arguments, alone, tmp_path):
    processes = start(arguments, tmp_path)
    wait_for_step(processes, tmp_path, 5)
    for one in processes:
        one.kill()
    ended(processes)
    assert not (tmp_path / "results.json").exists()
    first, second = ended(start(arguments, tmp_path))
    assert first[0] == second[0] == 0, (first, second)
    assert "resuming" in first[1] and "trainable params" in first[1]
    assert "trainable params" not in second[1] and "steps" not in second[1]  # one voice, but for Gloo's
    assert "tokens/s" in first[2] and "tokens/s" not in second[2]
    same_end(tmp_path, alone)


def test_a_preemption_of_one_stops_both_and_the_code_says_so(arguments, alone, tmp_path):
    processes = start([*arguments, "--config.checkpoint.every=0"], tmp_path)
    wait_for_step(processes, tmp_path, 3)
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ended(processes)] == [143, 143]
    done = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "checkpoints" / str(done)).is_dir() and done < 12
    # The run is not tied to its mesh: it goes on in one process, on two devices.
    again = [argument for argument in arguments if "config.mesh" not in argument]
    assert run.main([*again, "--config.mesh.data=1", "--config.mesh.fsdp=2", f"--workdir={tmp_path}"]) == 0
    same_end(tmp_path, alone)


def test_processes_that_were_started_differently_say_so_and_train_nothing(arguments, tmp_path):
    found = ended(start(arguments, tmp_path, ["--config.optim.learning_rate=0.5", "--overwrite"]))
    assert [code for code, _, _ in found] == [2, 2]
    assert all("error: the processes differ in optim, --overwrite: " in errors for _, _, errors in found)
    assert not (tmp_path / "config.json").exists()


def test_a_run_can_be_watched_closely(arguments, tmp_path):
    """--transfer_guard, --debug_nans and --profile: it trains the same, and leaves a trace of the steps asked for."""
    before = jax.config.jax_debug_nans
    try:
        assert run.main([*arguments, f"--workdir={tmp_path}", "--profile=2", "--transfer_guard=disallow",
                         "--debug_nans", "--config.optim.steps=4"]) == 0
    finally:
        jax.config.update("jax_debug_nans", before)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
