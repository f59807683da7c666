"""Two real processes train one run over jax.distributed on loopback; killed or told to stop, they end alike."""

import json
import os
import shutil
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
EVERY = 3  # steps; both are stopped between two of these, and a preemption saves there too
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_the_root")]


@pytest.fixture(scope="module")
def arguments(tiny_folder, films):
    settings = {"data.batch_size": 8, "data.collate": "pad", "optim.steps": 12, "optim.learning_rate": 1e-2,
                "checkpoint.every": EVERY, "eval.batch_size": 8, "eval.limit": 8, "eval.probe": "", "method.r": 4,
                "log.tensorboard": False, "task.prompt_column": "prompt", "task.completion_column": "completion",
                "task.validation_fraction": 0.2, **{f"mesh.{name}": size for name, size in MESH.items()}}
    return [f"--config=experiments/lora.py:model={tiny_folder},task={films(30)}",
            *[f"--config.{key}={value}" for key, value in settings.items()]]


@pytest.fixture(scope="module")
def alone(arguments, tmp_path_factory):
    """The workdir of the same run in one process with all eight devices, never interrupted, and watched closely."""
    folder, before = tmp_path_factory.mktemp("alone"), jax.config.jax_debug_nans
    try:
        assert run.main([*arguments, f"--workdir={folder}", "--profile=2", "--transfer_guard=disallow",
                         "--debug_nans"]) == 0
    finally:
        jax.config.update("jax_debug_nans", before)
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


@pytest.fixture(scope="module")
def interrupted(arguments, tmp_path_factory):
    """(workdir as a kill within a step leaves it, workdir of a preemption, its exit codes), of one start of both.

    What is on disk while both stand still is what SIGKILL would leave there. Then one of them is told to stop.
    """
    folder = tmp_path_factory.mktemp("both") / "preempted"
    processes = start(arguments, folder)
    wait_for_step(processes, folder, 2 * EVERY)
    for one in processes:
        one.send_signal(signal.SIGSTOP)
    killed = Path(shutil.copytree(folder, folder.parent / "killed"))
    processes[1].send_signal(signal.SIGTERM)
    for one in processes:
        one.send_signal(signal.SIGCONT)
    return killed, folder, [code for code, _, _ in ended(processes)]


def test_killed_in_a_step_they_go_on_and_end_as_if_nothing_had_been(arguments, alone, interrupted):
    folder = interrupted[0]
    assert not (folder / "results.json").exists() and read_metrics(folder / "metrics.jsonl")[-1]["step"] >= 2 * EVERY
    first, second = ended(start(arguments, folder))
    assert first[0] == second[0] == 0, (first, second)
    assert "resuming" in first[1] and "trainable params" in first[1]
    assert "trainable params" not in second[1] and "steps" not in second[1]  # one voice, but for Gloo's
    assert "tokens/s" in first[2] and "tokens/s" not in second[2]
    same_end(folder, alone)


def test_a_preemption_of_one_stops_both_and_the_code_says_so(arguments, alone, interrupted):
    _, folder, codes = interrupted
    assert codes == [143, 143]
    done = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert (folder / "checkpoints" / str(done)).is_dir() and done < 12
    # The run is not tied to its mesh: it goes on in one process, on two devices.
    again = [argument for argument in arguments if "config.mesh" not in argument]
    assert run.main([*again, "--config.mesh.data=1", "--config.mesh.fsdp=2", f"--workdir={folder}"]) == 0
    same_end(folder, alone)


def test_processes_that_were_started_differently_say_so_and_train_nothing(arguments, tmp_path):
    found = ended(start(arguments, tmp_path, ["--config.optim.learning_rate=0.5", "--overwrite"]))
    assert [code for code, _, _ in found] == [2, 2]
    assert all("error: the processes differ in optim, --overwrite: " in errors for _, _, errors in found)
    assert not (tmp_path / "config.json").exists()


def test_a_run_can_be_watched_closely(alone):
    """--transfer_guard, --debug_nans and --profile: it trains the same as others do above, and leaves a trace."""
    assert list((alone / "profile").rglob("*.xplane.pb"))
