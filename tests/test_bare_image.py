"""Where a package is lacking, a command that needs it says so in one line, before it works in vain."""

import subprocess
import sys
from pathlib import Path

import pytest

import run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package, arguments, words", [
    ("absl", ["--help"], "needed to read a command line, and is not installed: pip install absl-py"),
    ("ml_collections", ["--help"], "needed to read a command line, and is not installed: pip install ml_collections"),
    pytest.param("pandas", ["--config=experiments/compare.py", "--mode=report"], "pip install pandas",
                 marks=pytest.mark.slow),
])
def test_a_command_without_a_package_is_an_error_of_one_line(package, arguments, words):
    hidden = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['run.py', *{arguments}]; "
    done = subprocess.run([sys.executable, "-c", f"{hidden}import run; sys.exit(run.main())"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_tensorboard_is_missed_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.chdir(ROOT)
    assert run.main(["--config=experiments/lora.py", f"--workdir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "--config.log.tensorboard=False does without), and is not installed: pip install tensorboardX" in said
    assert said.count("\n") == 1


def test_a_module_of_our_own_that_is_not_there_is_no_package(monkeypatch):
    def broken(command, argv):
        raise ModuleNotFoundError("No module named 'peft_jax.nothing'", name="peft_jax.nothing")

    monkeypatch.setattr(run, "start", broken)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ModuleNotFoundError):
        run.main(["--config=experiments/lora.py"])
