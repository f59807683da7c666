"""Experiment files that are none, keys that are no keys, values that nothing can mean: one line each."""

import os

import pytest

import run

LORA = "--config=experiments/lora.py"
pytestmark = pytest.mark.usefixtures("at_the_root")


def fails(capsys, *argv):
    """The one line on standard error that a command line ends with."""
    capsys.readouterr()
    assert run.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and err.rstrip("\n").isprintable(), err
    return err


MADE = "from configs import base\ndef get_config(arg):\n    config = base.get_config()\n    {}\n    return config\n"


@pytest.mark.parametrize(("text", "words"), [
    ("def get_config(:\n", "e.py, line 1: SyntaxError: "),
    ("x = 1\n1/0\n", "e.py, line 2: ZeroDivisionError: division by zero"),
    ("import sys\nsys.exit(0)\n", "e.py, line 2: SystemExit: 0"),
    ("import nothing_of_this_name\n", "e.py, line 1: ModuleNotFoundError: "),
    ("def get_config(arg):\n    return {}[arg]\n", "e.py, line 2: KeyError: "),
    ("def get_config(arg): return get_config(arg)\n", "e.py, line 1: RecursionError: "),
    ("def get_config(): return 1\n", "e.py: TypeError: get_config() takes 0"),
    ("\0", "e.py: SyntaxError: source code string cannot contain null bytes"),
    ("x = 1\n", "no function get_config"),
    ("get_config = 3\n", "no function get_config"),
    ("def get_config(arg): return None\n", "get_config returns nothing: return the ConfigDict"),
    ("def get_config(arg): return {}\n", "get_config returns dict: return the ConfigDict"),
    (MADE.format("config.measure = 3"), "e.py, line 4: TypeError: "),
    (MADE.format("del config.optim"), "lacks config.optim: start from configs/base.py"),
    (MADE.format("del config.optim.steps"), "lacks config.optim.steps: start from configs/base.py"),
    (MADE.format("config.optim.learning_rat = 3"), "config.optim.learning_rat is no key; did you mean learning_rate?"),
    (MADE.format("config.methods = 3"), "config.methods is no key; did you mean method?"),
    (MADE.format("config.method.rr = 3"), "config.method.rr is no key"),
    (MADE.format("config.method = 3"), "e.py, line 4: TypeError: "),
    (MADE.format("config.sweep = 3"), "config.sweep: expected a section, found int"),
    (MADE.format("config.sweep = type(config)({'seeds': (0,)})"), "lacks config.sweep.metric"),
    (MADE.format("config.task = type(config)({'name': 'mine'})"), "config.task.kind: expected str, found nothing"),
    (MADE.format("config.task.kind = 'rated'"), "--config.task.kind=rated: choose one of: file, hub, r"),
    (MADE.format("config.task.kind = 'file'"), "lacks config.task.chat"),
    (MADE.format("config.task.words = ('bad', 'good')"), "config.task has 2, 5 and 4"),
    (MADE.format("config.task.bins = (2.0, 0.5, -0.5, -2.0)"), "in rising order"),
    (MADE.format("config.task.bins = ('a', 'b', 'c', 'd')"), "task.bins=('a', 'b', 'c', 'd'): expected numbers"),
    (MADE.replace("get_config()", "get_config(method='lora+ia3')").format("config.method.order = ('lora', 'nothing')"),
     "--config.method.order=('lora', 'nothing'): the names of the chain's methods"),
])
def test_what_an_experiment_file_does_wrong_is_one_line_with_its_place(tmp_path, capsys, text, words):
    (tmp_path / "e.py").write_text(text)
    assert words in fails(capsys, f"--config={tmp_path / 'e.py'}")


@pytest.mark.parametrize(("cells", "words"), [
    ("", "makes a sweep and has no function get_cells(config)"),
    ("def get_cells(config): return [1]\n", "get_cells returns no list of configs.sweeps.Cell"),
    ("def get_cells(config): raise ValueError('no cells')\n", "e.py, line 4: ValueError: no cells"),
])
def test_what_a_sweep_s_file_does_wrong(tmp_path, capsys, cells, words):
    (tmp_path / "e.py").write_text("from configs import sweeps\ndef get_config(arg):\n"
                                   f"    return sweeps.base_of('budget=smoke', 'lora')\n{cells}")
    assert words in fails(capsys, f"--config={tmp_path / 'e.py'}")


@pytest.mark.parametrize(("make", "words"), [
    (os.mkdir, "e.py is a folder, not a file"), (os.mkfifo, "e.py is a named pipe, not a file"),
    (lambda path: path.symlink_to("/dev/zero"), "e.py is a device, not a file"),
    (lambda path: path.symlink_to(path), "e.py: there is no such file"),
])
def test_an_experiment_is_a_file(tmp_path, capsys, make, words):
    make(tmp_path / "e.py")
    assert words in fails(capsys, f"--config={tmp_path / 'e.py'}")


@pytest.mark.parametrize("key", ["__class__", "keys", "items", "lora.__init__", "method.__class__", "optim.update", "",
                                 ".", "method.", "method..r", "seed.real", "__dict__", "_fields", "lock", "seed ",
                                 "method[0]", "x" * 300])
def test_what_is_no_key_is_refused_whatever_it_is_of_a_configuration(capsys, key):
    for argument in (f"--config.{key}=3", f"--config.{key}=", f"--noconfig.{key}"):
        fails(capsys, LORA, argument)


@pytest.mark.parametrize(("argument", "words"), [
    ("--config.measure.general=3", "--config.measure.general=(3,): expected texts, found tuple"),
    ("--config.measure.neighbours=None", "--config.measure.neighbours=(None,): expected texts"),
    ("--config.measure.general=((1,),)", "expected texts"),
    ("--config.measure.general=" + "x" * 300, "is neither a name of configs/tasks.py"),
    ("--config.task.words=(1,2)", "expected texts"),
    ("--config.task.bins=a,b", "expected numbers"),
    ("--config.seed=1" + "0" * 400, "expected a whole number of at most 2147483647"),
    ("--config.mesh.data=99999999999", "expected a whole number of at most 2147483647"),
    ("--config.optim.learning_rate=1" + "0" * 400, "must be a finite number"),
    ("--config.eval.probe=" + "x" * 300, "is neither a name of configs/tasks.py"),
    ("--config.seed=a\nb", r"--config.seed=a\nb: expected int"),
    ("--config.model.source=a\0b", r"the argument '--config.model.source=a\x00b' is no text in UTF-8"),
    ("--workdir=\udcff", "is no text in UTF-8"),
    ("--workdir=" + "x" * 300, "File name too long: choose another folder"),
    ("--config=" + "x" * 300, "there is no such file"),
    ("--config=experiments/lora.py:model=" + "x" * 300, "is neither a name of configs/models.py"),
    ("--config=experiments/lora.py:model=~nobody_of_this_name", "there is no such file or folder"),
    ("--config=experiments/lora.py:task=hub:" + "x/" * 200, "is neither a name of configs/tasks.py"),
    ("--config=experiments/compare.py:methods=" + "x" * 300, "methods=xxx"),
])
def test_a_value_that_nothing_can_mean_is_one_line(capsys, argument, words):
    assert words in fails(capsys, LORA, argument) or argument.startswith("--config=experiments/lora.py:task=hub")


def test_a_name_that_no_folder_can_have_is_seen_before_anything_is_done(capsys):
    assert "--output=xxx" in fails(capsys, LORA, "--mode=merge", "--output=" + "x" * 300)
    assert "num_labels=99999: must be 1 to 65536" in fails(
        capsys, "--config=experiments/minilm_lora.py:task=a/b", "--config.task.num_labels=99999")
