"""A disk that takes no more bytes: one line, nothing lost, and the same command goes on once there is room."""

import os
import subprocess
import sys

import pytest

import run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_the_root")]
PROGRAM = """if True:
    import resource, runpy
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))  # bytes of a file: enough for config.json, no checkpoint
    runpy.run_path("run.py", run_name="__main__")
"""


def test_one_line_and_the_same_command_goes_on(tiny_folder, films, tmp_path, capsys):
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 4, "checkpoint.every": 2, "eval.before": False,
                "eval.limit": 2, "eval.probe": "", "method.r": 4, "task.prompt_column": "prompt",
                "task.completion_column": "completion"}  # fmt: skip
    command = [f"--config=experiments/lora.py:model={tiny_folder},task={films(6)}", f"--workdir={tmp_path / 'run'}",
               *(f"--config.{key}={value}" for key, value in settings.items())]
    full = subprocess.run([sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True,
                          env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    lines = [line for line in full.stderr.splitlines() if line and not line.startswith("step ")]
    assert full.returncode == 2 and len(lines) == 1, full.stderr
    assert lines[0].startswith("error: ") and "File too large" in lines[0] and "same command" in lines[0]
    assert not (tmp_path / "run" / "results.json").exists()
    assert run.main(command) == 0
    assert not [path for path in (tmp_path / "run").iterdir() if path.suffix == ".tmp" or path.name.startswith(".")]
    check_evaluated_before_it_is_written(command, tmp_path / "run", capsys)


def check_evaluated_before_it_is_written(command, folder, capsys):
    (folder / "eval.json").mkdir()  # nothing can be written there
    capsys.readouterr()  # what training said
    assert run.main([*command, "--mode=eval"]) == 2
    told = capsys.readouterr()
    assert "held-out loss" in told.out and told.err.startswith(f"error: workdir {folder} cannot be written: ")
