"""A sweep from end to end on the tiny model: records, what is chosen and measured, resuming, failures."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import run
from peft_jax.cli import sweep_cell as cells
from peft_jax.cli import sweeps
from peft_jax.errors import PeftJaxError
from peft_jax.studies.comparison import record

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("at_the_root")]


def _index(name, arguments):
    return next(i for i, cell in enumerate(run.parse_command(arguments).cells) if cell.name == name)


def _copied(compared, tmp_path):
    return Path(shutil.copytree(compared, tmp_path / "compare"))


def _instead(monkeypatch, code, then=lambda: None):
    """The process of each cell runs ``code`` instead, and ``then`` is called; returns what would have been run."""
    popen, commands = sweeps.subprocess.Popen, []

    def started(command, **options):
        commands.append(command)
        process = popen([sys.executable, "-c", code], **options)
        then()
        return process

    monkeypatch.setattr(sweeps.subprocess, "Popen", started)
    return commands


def _terminate_soon(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM)).start()


def _changed(path, change):
    """Change a JSON file by a function of what it holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


BEST, TRIED = "lora--lora-best-seed-0.json", "lora--lora-learning_rate-0.001-seed-0.json"


def test_records_are_peft_s_shape_and_say_what_was_measured(compared):
    records = {one["run_info"]["experiment_name"]: one for one in record.read(compared / "results")}
    assert len(records) == 7 and "base/base" in records
    one = records["lora/lora-best-seed-0"]
    assert one["run_info"]["error_msg"] == "" and one["train_info"]["status"] == "success"
    assert one["run_info"]["peft_config"]["peft_type"] == "LORA" and one["run_info"]["train_config"]["max_steps"] == 2
    assert one["run_info"]["total_time"] > 0 and one["train_info"]["train_time"] > 0
    assert one["train_info"]["num_trainable_params"] == 2 * 2 * 16 * (32 + 32) - 2 * 16 * 16  # q 32, v 16 wide
    ours = one["peft_jax"]
    assert ours["cell"]["chosen"] and ours["metric"] == "-loss" and ours["test"]["-loss"] == -ours["test"]["loss"]
    assert ours["base_test"]["loss"] == records["base/base"]["peft_jax"]["test"]["loss"] != ours["test"]["loss"]
    general = ours["general"]["python_reference"]
    assert general["before"] == records["base/base"]["peft_jax"]["general"]["python_reference"]["after"]
    assert set(ours["latency"]) == {"base", "unmerged", "merged"}
    assert ours["memory"]["observed"] > ours["memory"]["compiled"] > 0
    assert [step for step, _ in ours["loss"]] == [1, 2]
    last = one["train_info"]["metrics"][-1]
    assert last["test accuracy"] == ours["test"]["-loss"]
    assert last["forgetting"] == pytest.approx(general["after"] - general["before"])
    assert records["full/full-best-seed-0"]["run_info"]["peft_config"] is None


def test_the_best_rate_on_validation_data_is_measured_where_it_was_trained(compared):
    tried = {path.stem: json.loads(path.read_text()) for path in (compared / "results").glob("lora--lora-learning*")}
    best = max(tried.values(), key=lambda one: one["peft_jax"]["validation"]["-loss"])
    measured = json.loads((compared / "results" / "lora--lora-best-seed-0.json").read_text())
    assert measured["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == best["run_info"]["train_config"][
        "optimizer_kwargs"]["lr"]
    assert measured["peft_jax"]["validation"] == best["peft_jax"]["validation"]
    folders = {path.name for path in (compared / "runs").iterdir()}
    assert len(folders) == 5 and "base" in folders  # two rates of two methods: the best were not trained again
    assert not list((compared / "runs").glob("*/checkpoints"))


def test_a_finished_sweep_runs_nothing_and_tells(compared, arguments, capsys, monkeypatch):
    monkeypatch.setattr(sweeps.subprocess, "Popen", None)  # calling it would fail
    assert run.main([*arguments, f"--workdir={compared}"]) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 7 and "lora" in out and "report.html" in out
    assert {path.name for path in compared.iterdir()} >= {"table.md", "table.csv", "table.json", "report.html", "plots"}
    rows = {row["method"]: row for row in json.loads((compared / "table.json").read_text())["rows"]}
    assert {"base", "lora", "full"} <= rows.keys() and rows["lora"]["value"]["n"] == 1


def test_the_cells_are_listed_with_the_numbers_of_a_job_array(compared, arguments, capsys):
    assert run.main([*arguments, f"--workdir={compared}", "--mode=cells"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and all("finished" in line for line in lines)
    assert lines[1].startswith("   1  lora-learning_rate-0.001-seed-0") and "the best of 2" in lines[-1]


def test_other_settings_are_refused_before_anything_runs(compared, arguments, capsys):
    assert run.main([*arguments, f"--workdir={compared}", "--config.optim.steps=3"]) == 2
    assert "optim.steps was 2, now 3" in capsys.readouterr().err


def test_a_failed_cell_says_why_does_not_stop_the_rest_and_is_run_again(
        compared, arguments, tmp_path, capsys, in_this_process):
    folder = _copied(compared, tmp_path)
    in_this_process.append(_index(TRIED[6:-5], arguments))
    names = ["lora--lora-learning_rate-0.001-seed-0", "full--full-best-seed-0"]
    for name in names:
        (folder / "results" / f"{name}.json").unlink()
    (folder / "runs" / "lora-learning_rate-0.001-seed-0" / "results.json").write_text("[]")
    assert run.main([*arguments, f"--workdir={folder}"]) == 2
    out = capsys.readouterr().out
    assert "lora-learning_rate-0.001-seed-0: failed: " in out and "not a JSON object" in out
    assert "full-best-seed-0: -loss" in out and out.count("finished before") == 5
    failed = json.loads((folder / "results" / f"{names[0]}.json").read_text())
    assert failed["train_info"]["status"] == "failed" and "not a JSON object" in failed["run_info"]["error_msg"]
    shutil.rmtree(folder / "runs" / "lora-learning_rate-0.001-seed-0")
    in_this_process.clear()
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    assert "lora-learning_rate-0.001-seed-0: -loss" in capsys.readouterr().out


def test_a_sweep_that_is_told_to_stop_tells_its_run(compared, arguments, tmp_path, capsys, monkeypatch):
    """SIGTERM reaches the sweep alone, as a cluster's does; the run ends with 143, and so does the sweep."""
    folder = _copied(compared, tmp_path)
    (folder / "results" / BEST).unlink()
    waits = ("import time, signal, sys; signal.signal(15, lambda *_: sys.exit(143)); print('up', flush=True); "
             "time.sleep(60)")

    def up():
        while "up" not in (folder / "logs" / "lora-best-seed-0.log").read_text():
            time.sleep(0.05)
        _terminate_soon(0.2)

    _instead(monkeypatch, waits, up)
    assert run.main([*arguments, f"--workdir={folder}"]) == 143
    assert "lora-best-seed-0: stopped; the same command goes on from there" in capsys.readouterr().out


def test_a_run_that_a_signal_ends_is_a_failed_one_that_says_so(compared, arguments, tmp_path, capsys, monkeypatch):
    """As the system ends one that takes too much memory: it has no time to write a record."""
    folder = _copied(compared, tmp_path)
    (folder / "results" / BEST).unlink()
    _instead(monkeypatch, "import os; print('step 1', flush=True); os.kill(os.getpid(), 9)")
    assert run.main([*arguments, f"--workdir={folder}"]) == 2
    out = capsys.readouterr().out
    assert "lora-best-seed-0: failed: ended by signal 9 (Killed), see " in out
    assert "Not finished:\nlora/lora-best-seed-0: failed: ended by signal" in out
    failed = json.loads((folder / "results" / BEST).read_text())
    assert failed["train_info"]["status"] == "failed" and "signal 9" in failed["run_info"]["error_msg"]


@pytest.mark.parametrize("ends", ["time.sleep(60)", "signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)"])
def test_a_sweep_that_is_told_to_stop_runs_no_other_cell(compared, arguments, tmp_path, capsys, monkeypatch, ends):
    """Also while a cell loads or measures, where SIGTERM just ends it, or is at its very end and finishes."""
    folder = _copied(compared, tmp_path)
    for name in (BEST, "full--full-best-seed-0.json"):
        (folder / "results" / name).unlink()
    code = f"import signal, sys, time; print('up', flush=True); {ends}"
    started = _instead(monkeypatch, code, lambda: _terminate_soon(1))
    assert run.main([*arguments, f"--workdir={folder}"]) == 143
    assert len(started) == 1 and "stopped; the same command goes on from there" in capsys.readouterr().out


def test_a_damaged_record_is_of_a_cell_to_run_again(compared, arguments, tmp_path, capsys, in_this_process):
    folder = _copied(compared, tmp_path)
    for text in ('{"run_info": {"exp', "[]", '{"train_info": []}', '{"run_info": {"experiment_name": 3}}'):
        (folder / "results" / BEST).write_text(text)
        assert run.main([*arguments, f"--workdir={folder}", "--mode=cells"]) == 0
        assert capsys.readouterr().out.count("finished)") == 6
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    assert "lora-best-seed-0: -loss" in capsys.readouterr().out


def test_a_better_rate_found_later_is_chosen_then(compared, arguments, tmp_path, capsys, in_this_process):
    """Such as of a run that had failed: the best cell was finished without it."""
    folder = _copied(compared, tmp_path)
    best = json.loads((folder / "results" / BEST).read_text())["peft_jax"]["cell"]["settings"]
    other = next(path for path in (folder / "results").glob("lora--lora-learning*")
                 if json.loads(path.read_text())["peft_jax"]["cell"]["settings"] != best)
    _changed(other, lambda one: one["peft_jax"]["validation"].update({"-loss": -0.01}))
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    assert capsys.readouterr().out.count("finished before") == 6
    now = json.loads((folder / "results" / BEST).read_text())["peft_jax"]["cell"]["settings"]
    assert now == json.loads(other.read_text())["peft_jax"]["cell"]["settings"] != best


def test_a_rate_whose_metric_is_not_finite_is_not_chosen(compared, arguments, tmp_path):
    folder = _copied(compared, tmp_path)
    command = run.parse_command([*arguments, f"--workdir={folder}"])
    best = next(cell for cell in command.cells if cell.name == "lora-best-seed-0")
    _changed(folder / "results" / TRIED, lambda one: one["peft_jax"]["validation"].update({"-loss": None}))
    other = next(cell for cell in command.cells if cell.name in best.best_of and cell.name != TRIED[6:-5])
    assert cells.results.chosen(folder, command, best) == other.settings
    _changed(folder / "results" / f"lora--{other.name}.json",
             lambda one: one["peft_jax"]["validation"].update({"-loss": float("nan")}))
    with pytest.raises(PeftJaxError, match="none of which is finished"):
        cells.results.chosen(folder, command, best)


def test_a_cell_measured_before_the_base_is_measured_beside_it(compared, arguments, tmp_path, capsys, in_this_process):
    """Job arrays run in any order."""
    folder = _copied(compared, tmp_path)
    base = folder / "results" / "base--base.json"
    base.rename(tmp_path / "base.json"), (folder / "runs" / "base").rename(tmp_path / "base")
    (folder / "results" / BEST).unlink()
    index = _index("lora-best-seed-0", arguments)
    assert run.main([*arguments, f"--workdir={folder}", f"--sweep_index={index}"]) == 0
    assert not json.loads((folder / "results" / BEST).read_text())["peft_jax"]["base_test"]
    (tmp_path / "base.json").rename(base), (tmp_path / "base").rename(folder / "runs" / "base")
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    assert json.loads((folder / "results" / BEST).read_text())["peft_jax"]["base_test"]


def test_one_cell_alone_is_not_run_again_nor_with_other_settings(compared, arguments, tmp_path, capsys):
    folder = _copied(compared, tmp_path)
    index, text = _index("lora-best-seed-0", arguments), (folder / "results" / BEST).read_text()
    assert run.main([*arguments, f"--workdir={folder}", f"--sweep_index={index}"]) == 0
    assert "finished" in capsys.readouterr().out
    assert run.main([*arguments, f"--workdir={folder}", f"--sweep_index={index}", "--config.eval.limit=3"]) == 2
    assert "eval.limit was 8, now 3" in capsys.readouterr().err
    assert (folder / "results" / BEST).read_text() == text
    for path in (folder / "results").iterdir():  # as if each had been stopped before its record was written
        path.unlink()
    assert run.main([*arguments, f"--workdir={folder}", f"--sweep_index={_index(TRIED[6:-5], arguments)}",
                     "--config.eval.limit=3"]) == 2
    assert "eval.limit was 8, now 3" in capsys.readouterr().err


def test_what_a_cell_is_not_measured_by_may_change(compared, arguments, tmp_path, capsys, in_this_process):
    """Where measuring failed, runs that were only trained need not be trained again to measure otherwise."""
    folder = _copied(compared, tmp_path)
    for path in [*(folder / "results").glob("*best*"), folder / "results" / "base--base.json"]:
        _changed(path, lambda one: one["train_info"].update(status="failed"))
    assert run.main([*arguments, f"--workdir={folder}", "--config.measure.prompt_tokens=4"]) == 0
    assert capsys.readouterr().out.count("finished before") == 4


def test_the_metric_that_was_chosen_by_is_a_setting(compared, arguments, capsys):
    assert run.main([*arguments, f"--workdir={compared}", "--config.sweep.metric=-perplexity"]) == 2
    assert 'metric was "-loss", now "-perplexity"' in capsys.readouterr().err


def test_two_sweeps_in_one_workdir_at_once(compared, arguments, tmp_path, capsys):
    folder = _copied(compared, tmp_path)
    with cells.results.locked(folder, "sweep"):
        assert run.main([*arguments, f"--workdir={folder}"]) == 2
        assert "another process is at sweep now" in capsys.readouterr().err
    (folder / "results" / BEST).unlink()
    name = json.loads((compared / "results" / BEST).read_text())["peft_jax"]["cell"]["settings"]["optim.learning_rate"]
    with cells.results.locked(folder, f"lora-learning_rate-{name:g}-seed-0"):
        index = _index("lora-best-seed-0", arguments)
        assert run.main([*arguments, f"--workdir={folder}", f"--sweep_index={index}"]) == 2
        assert "another process is at lora-learning_rate" in capsys.readouterr().err
    assert not (folder / "results" / BEST).exists()


def test_to_overwrite_forgets_all_cells_first_and_goes_on_without(compared, arguments, tmp_path, capsys, monkeypatch):
    folder, commands = _copied(compared, tmp_path), _instead(monkeypatch, "import sys; sys.exit(143)")
    (folder / "results" / BEST).write_text("{")
    assert run.main([*arguments, f"--workdir={folder}", "--overwrite", "--config.eval.limit=3"]) == 143
    assert "without --overwrite goes on from there" in capsys.readouterr().out
    assert not list((folder / "results").iterdir()) and not list((folder / "runs").iterdir())
    assert not run.parse_command(commands[0][2:]).overwrite  # the best of all is not trained twice


def test_a_report_that_cannot_be_written_is_still_told(compared, arguments, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sweeps, "report", full)
    assert run.main([*arguments, f"--workdir={compared}", "--mode=report"]) == 2
    out, err = capsys.readouterr()
    assert "lora" in out and "cannot be written to" in err and "No space left on device" in err


def test_a_best_cell_needs_one_to_choose_from(arguments, tmp_path, capsys):
    assert run.main([*arguments, f"--workdir={tmp_path}", "--sweep_index=5"]) == 2
    assert "none of which is finished: run these cells first" in capsys.readouterr().err
