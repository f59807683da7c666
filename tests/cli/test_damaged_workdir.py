"""Every mode on a workdir of which one file is damaged, or is something else: one line that names it, at once."""

import json
import os

import pytest

import run
from peft_jax.cli import workdir

pytestmark = pytest.mark.usefixtures("at_the_root")
RESULTS = {"before": {}, "after": {"loss": 1.0}, "trainable": 1, "all": 2, "seconds": 1.0, "steps": 2,
           "peak_memory": {"host": 1}, "adapter": "a", "adapter_bytes": 1}  # fmt: skip
READ = {  # by mode, the files that it reads before it loads anything
    "train": ("results.json", "config.json", "manifest.json", "lock", "lock.json"),
    "eval": ("config.json", "manifest.json"), "generate": ("config.json", "manifest.json"),
    "merge": ("config.json", "manifest.json"), "measure": ("measured.json", "manifest.json"),
}  # fmt: skip
DAMAGES = {
    "a list": "[]", "null": "null", "a number": "3", "NaN": "NaN", "cut": '{"a": ', "empty": "", "binary": "\0\xff",
    "deep": "[" * 100_000, "a folder": os.mkdir, "a pipe": os.mkfifo, "a device": lambda path:
    path.symlink_to("/dev/zero"),
}  # fmt: skip
ANY = ("lock", "lock.json")  # files whose content may be anything


@pytest.fixture(scope="module")
def arguments(tiny_folder, films):
    return [f"--config=experiments/lora.py:model={tiny_folder},task={films(4)}", "--config.measure.general=()",
            "--config.task.prompt_column=prompt", "--config.task.completion_column=completion",
            "--config.measure.neighbours=()", "--config.eval.probe=", "--config.optim.steps=2"]  # fmt: skip


@pytest.fixture
def folder(arguments, tmp_path):
    """What a finished run leaves, but for the weights."""
    workdir.start(tmp_path, run.parse_command(arguments).config.to_dict(), overwrite=False)
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "measured.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name", "damage"), [
    (mode, name, damage) for mode, names in READ.items() for name in names for damage in DAMAGES
    if name not in ANY or callable(DAMAGES[damage])])
def test_a_damaged_file_is_one_line_that_names_it(arguments, folder, capsys, mode, name, damage):
    made = DAMAGES[damage]
    (folder / name).unlink(missing_ok=True)
    if isinstance(made, str):
        (folder / name).write_bytes(made.encode("latin-1"))
    else:
        made(folder / name)
    before = sorted(path.name for path in folder.iterdir())
    capsys.readouterr()
    assert run.main([*arguments, f"--mode={mode}", f"--workdir={folder}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(folder / name) in err, err
    assert {*before, "lock"} >= {path.name for path in folder.iterdir()} >= set(before) - {"lock", "lock.json"}


def test_an_undamaged_one_is_read(arguments, folder, capsys):
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    assert "nothing is left to train" in capsys.readouterr().out
