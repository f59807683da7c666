"""A small comparison, run once."""

import contextlib

import pytest

import run
from peft_jax.cli import sweeps


@pytest.fixture(scope="module")
def arguments(tiny_folder, films):
    """The flags of a small comparison; on this task, which has no words to choose from, by the loss."""
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 2, "eval.batch_size": 4,
                "task.prompt_column": "prompt", "task.completion_column": "completion", "task.validation_fraction": 0.5,
                "measure.prompt_tokens": 8, "measure.new_tokens": 2, "measure.repeats": 1,
                "measure.neighbours": "()", "measure.general": "('python_reference',)", "measure.general_limit": 2,
                "eval.limit": 8, "sweep.rates": 2}  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config=experiments/compare.py:budget=smoke,methods=lora+full,model={tiny_folder},task={films(20)}",
            *overrides]


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
    """The workdir of a finished comparison, cell by cell in this process."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    for index in range(7):
        assert run.main([*arguments, f"--workdir={folder}", f"--sweep_index={index}"]) == 0
    return folder


@pytest.fixture
def in_this_process(monkeypatch):
    """Cells run here, where all is imported and compiled, but for those whose numbers are put into the list that this
    returns: the test of a failed cell starts a real one."""
    popen, apart = sweeps.subprocess.Popen, []

    class Here:
        def __init__(self, command, stdout, stderr):
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout):
                self.code = run.main(command[2:])

        def wait(self):
            return self.code

    def started(command, **options):
        index = next((int(part.split("=")[1]) for part in command if part.startswith("--sweep_index=")), None)
        return (popen if index is None or index in apart else Here)(command, **options)

    monkeypatch.setattr(sweeps.subprocess, "Popen", started)
    return apart
