"""A sweep from end to end on the tiny model: records, what is chosen and measured, resuming, failures."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

import run
from peft_jax.comparison import record
from peft_jax.errors import PeftJaxError
from peft_jax.sweep import cell as cells
from peft_jax.sweep import job

pytestmark = pytest.mark.usefixtures("at_the_root")


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
    monkeypatch.setattr(job.subprocess, "Popen", None)  # calling it would fail
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


def test_a_failed_cell_says_why_does_not_stop_the_rest_and_is_run_again(compared, arguments, tmp_path, capsys):
    folder = tmp_path / "compare"
    shutil.copytree(compared, folder)
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
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    assert "lora-learning_rate-0.001-seed-0: -loss" in capsys.readouterr().out


def test_a_sweep_that_is_told_to_stop_tells_its_run(compared, arguments, tmp_path, capsys, monkeypatch):
    """SIGTERM reaches the sweep alone, as a cluster's does; the run ends with 143, and so does the sweep."""
    folder = tmp_path / "compare"
    shutil.copytree(compared, folder)
    (folder / "results" / "lora--lora-best-seed-0.json").unlink()
    waits = ("import time, signal, sys; signal.signal(15, lambda *_: sys.exit(143)); print('up', flush=True); "
             "time.sleep(60)")
    popen = job.subprocess.Popen

    def stopped(command, **options):
        process = popen([sys.executable, "-c", waits], **options)
        while "up" not in (folder / "logs" / "lora-best-seed-0.log").read_text():
            time.sleep(0.05)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return process

    monkeypatch.setattr(job.subprocess, "Popen", stopped)
    assert run.main([*arguments, f"--workdir={folder}"]) == 143
    assert "lora-best-seed-0: stopped; the same command goes on from there" in capsys.readouterr().out


def test_a_best_cell_needs_one_to_choose_from(arguments, tmp_path, capsys):
    assert run.main([*arguments, f"--workdir={tmp_path}", "--sweep_index=5"]) == 2
    assert "none of which is finished: run these cells first" in capsys.readouterr().err


def test_a_metric_that_the_runs_do_not_have(compared):
    found = run.parse_command(["--config=experiments/compare.py:budget=smoke,methods=lora"]).cells
    command = SimpleNamespace(cells=found,
                              config=SimpleNamespace(sweep=SimpleNamespace(metric="among_choices")))
    with pytest.raises(PeftJaxError, match=r"sweep\.metric=among_choices: the runs have loss, perplexity"):
        cells.chosen(compared, command, found[-1])
