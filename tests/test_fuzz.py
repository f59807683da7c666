"""``benchmarks/fuzz``: it runs, goes on where it stopped, and sees what it is to see: faults planted for it."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from random import Random

import pytest

from benchmarks.fuzz import kills
from benchmarks.fuzz.cases import Outcome, Trial, equal, never, outcome_of
from benchmarks.fuzz.pool import Worker, environment, resident
from benchmarks.fuzz.surfaces import data
from peft_jax.errors import PeftJaxError

ROOT = Path(__file__).parents[1]


def raising(error):
    def read():
        raise error

    return read


@pytest.mark.parametrize(("read", "judge", "kind"), [
    (lambda: 3, equal(3), "accepted"), (lambda: 4, equal(3), "silent"), (lambda: 3, never, "silent"),
    (lambda: {"a": float("nan")}, equal({"a": float("nan")}), "accepted"),
    (lambda: {"a": 1, "b": 2}, equal({"a": 1, "b": 3}), "silent"),
    (raising(PeftJaxError("no such file")), never, "refused"), (raising(KeyError("x")), never, "traceback"),
    (raising(SystemExit(0)), never, "traceback"), (raising(MemoryError()), never, "memory"),
    (raising(RecursionError()), never, "traceback"),
])
def test_what_came_of_an_input_has_its_name(read, judge, kind):
    assert outcome_of(Trial("planted", read, judge)).kind == kind


def test_a_refusal_of_what_changes_nothing_is_a_fault_and_so_is_one_of_two_lines():
    assert outcome_of(Trial("", raising(PeftJaxError("no")), never, harmless=True)).kind == "harmless refused"
    error = PeftJaxError("one")
    error.args = ("one\ntwo",)
    assert outcome_of(Trial("", raising(error), never)) == Outcome(
        "traceback", "a refusal of more than one line: 'one\\ntwo'")


PLANTED = {
    "hang": "import time; time.sleep(60)", "pipe": "import os; os.mkfifo(folder / 'p'); (folder / 'p').read_text()",
    "memory": "x = b'x' * (600 << 20); import time; time.sleep(30)", "traceback": "1 / 0",
    "death": "import os; os.kill(os.getpid(), 9)", "silent": "return 4", "accepted": "return 3",
    "refused": "from peft_jax.errors import PeftJaxError; raise PeftJaxError('no')",
}  # fmt: skip


@pytest.mark.slow
def test_a_watched_process_tells_every_fault_that_was_planted(tmp_path, monkeypatch):
    surfaces = tmp_path / "planted" / "benchmarks" / "fuzz" / "surfaces"
    surfaces.mkdir(parents=True)
    for name, read in PLANTED.items():
        (surfaces / f"{name}.py").write_text(
            "from benchmarks.fuzz.cases import Trial, equal\ndef prepare(place):\n    return None\n"
            f"def trial(base, rng, folder):\n    def read():\n        {read}\n"
            f"    return Trial('{name}', read, equal(3))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"))
    worker = Worker(tmp_path, 0, seconds=2, memory=500 << 20)
    answers = {name: worker.ask(name, 0) for name in PLANTED}
    process = worker.process
    worker.end()
    expected = {"pipe": "hang", "death": "traceback"}
    assert {name: answer["kind"] for name, answer in answers.items()} == {
        name: expected.get(name, name) for name in PLANTED}
    assert all(answer["what"] == name for name, answer in answers.items())
    assert process is not None and resident(process.pid) == 0


@pytest.fixture
def fuzz():
    """``benchmarks/fuzz`` as a program."""
    spec = importlib.util.spec_from_file_location("fuzz_main", ROOT / "benchmarks" / "fuzz" / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_inputs_are_the_same_of_the_same_seed_and_all_surfaces_have_their_share(fuzz, tmp_path):
    asked = fuzz.inputs(500, 1, None)
    assert asked == fuzz.inputs(500, 1, None) and len(set(asked)) == 500
    assert {name for name, _ in asked} == set(fuzz.SHARES) and sum(fuzz.SHARES.values()) == 100
    assert {file.stem for file in (ROOT / "benchmarks/fuzz/surfaces").glob("*.py")} == set(fuzz.SHARES)
    for seed in range(40):
        (one := tmp_path / f"one-{seed}").mkdir()
        (other := tmp_path / f"other-{seed}").mkdir()
        assert data.trial(None, Random(seed), one).what == data.trial(None, Random(seed), other).what
        assert [path.name for path in one.iterdir()] == [path.name for path in other.iterdir()]


@pytest.mark.slow
def test_the_script_runs_prints_its_table_and_goes_on(fuzz, tmp_path, capsys, monkeypatch):
    arguments = ["--inputs=24", "--kills=0", "--surface=data", "--limit=60", f"--folder={tmp_path}"]
    assert fuzz.main(arguments) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| data | 24 |"))
    assert row.endswith("| 0 | 0 | 0 | 0 | 0 |")
    (tmp_path / "worker-0.log").unlink()
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + '\n{"surface": "da')  # cut short by a crash
    assert fuzz.main(arguments) == 0 and row in capsys.readouterr().out
    assert not (tmp_path / "worker-0.log").exists()  # nothing was left to do
    for name, value in environment(tmp_path).items():  # which the next would else leave changed
        monkeypatch.setenv(name, value)
    assert fuzz.main([*arguments, "--only=3"]) == 0
    assert "Outcome(kind=" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_is_started_again_and_compared(tmp_path, capfd):
    """In a process of its own, which forks and must not compute itself."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--inputs=0", "--kills=1", f"--folder={tmp_path}"]
    process = os.spawnve(os.P_NOWAIT, sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)})
    assert kills.wait(process) == 0
    assert re.search(r"^1 kills of (\d+) runs: \1 ended as the one that nothing ended, bit for bit, 0 did not$",
                     capfd.readouterr().out, re.MULTILINE)


def test_what_a_killed_run_left_otherwise_is_named():
    base = {"adapter": {"weights": "a"}, "rows": [[1, 0.5]]}
    assert kills.difference(base, dict(base)) == ""
    assert kills.difference(base, {**base, "rows": [[1, 0.25]]}) == "rows was [[1, 0.5]], is [[1, 0.25]]"
