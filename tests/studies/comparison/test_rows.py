"""Which runs share a row, and what it is called."""

import statistics

import pytest

from peft_jax.studies.comparison.rows import failures, rows
from peft_jax.studies.comparison.runs import run_of
from tests.studies.comparison import examples


def rows_of(records):
    return rows(map(run_of, records))


def named(records):
    return {row.name: row for row in rows_of(records)}


def test_seeds_share_a_row_and_runs_that_lost_the_choice_have_none():
    records = examples.comparison(seeds=3)
    found = named(records)
    assert set(found) == set(examples.METHODS)
    tests = [record["peft_jax"]["test"]["among_choices"] for record in records
             if record["run_info"]["experiment_name"].startswith("ia3/") and "test" in record["peft_jax"]]  # fmt: skip
    assert found["ia3"].values["value"] == (statistics.fmean(tests), statistics.stdev(tests), 3)
    assert found["ia3"].values["gain"].mean == pytest.approx(statistics.fmean(tests) - 0.31)
    assert found["ia3"].values["trainable"] == (57_600, 0, 3)
    values = [row.values["value"].mean for row in rows_of(records)]
    assert values == sorted(values, reverse=True)


def test_failed_runs_are_no_rows_and_their_sweep_does_not_stand_in_for_them():
    lost = examples.record("ia3", rate=3e-3, chosen=False)
    broken = examples.record("ia3")
    broken["train_info"]["status"] = "failed"
    assert [row.name for row in rows_of([lost, broken, examples.record("lora")])] == ["lora"]
    assert [run.label for run in failures(map(run_of, [lost, broken]))] == ["ia3"]


def test_a_number_that_some_runs_lack_says_how_many_have_it():
    records = [examples.record(seed=seed) for seed in range(3)]
    del records[1]["peft_jax"]["test"], records[2]["peft_jax"]["memory"], records[2]["train_info"]
    records[2]["train_info"] = {"status": "success"}
    (row,) = rows_of(records)
    assert row.measured_on == "test" and row.values["value"].n == 2 and row.values["memory.observed"].n == 2
    assert "validation" in row.values and len(row.runs) == 3


def test_without_any_test_the_validation_counts():
    (row,) = rows_of([examples.record("ia3", chosen=False)])
    assert row.measured_on == "validation" and row.values["value"] == row.values["validation"]
    assert "gain" not in row.values


def test_an_ablation_has_a_row_for_each_setting():
    records = [examples.record(settings={"method.r": r, "method.init": init, "seed": seed}, chosen=None,
                           axes=["method.r", "method.init", "seed"])
               for r in (4, 8) for init in ("default", "pissa") for seed in (0, 1)]  # fmt: skip
    assert set(named(records)) == {f"lora r={r} init={init}" for r in (4, 8) for init in ("default", "pissa")}
    assert all(len(row.runs) == 2 for row in rows_of(records))


def test_runs_of_one_label_that_differ_otherwise_are_kept_apart():
    ours, theirs, again = examples.record(), examples.peft_record(), examples.peft_record("lora/llama-3.2-3B-rank64")
    twice = examples.peft_record("lora/llama-3.2-3B-rank64--2025-06-17T13-30-58+00-00", accuracy=0.5)
    found = named([ours, theirs, again, twice])
    assert found["lora llama-3.2-3B-rank64"].values["value"].n == 2
    assert {len(row.runs) for row in found.values()} == {1, 2} and len(found) == 3
    longer = examples.record()
    longer["run_info"]["train_config"]["max_steps"] = 500
    assert set(named([ours, longer])) == {"lora 100 steps of 16", "lora 500 steps of 16"}


def test_runs_that_were_told_to_do_otherwise_are_kept_apart():
    """Seeds of one workdir, some trained with another rate or measured on fewer examples, are no spread over seeds."""
    def asked(limit, rate=1e-3):
        return {"seed": 0, "optim": {"learning_rate": rate}, "measure": {"limit": limit}, "log": {"every": limit}}

    records = [examples.record(seed=seed, asked=asked(200 if seed < 2 else 50)) for seed in range(3)]
    assert {name: len(row.runs) for name, row in named(records).items()} == {
        "lora measure.limit=200": 2, "lora measure.limit=50": 1}
    records = [examples.record(seed=seed, chosen=False, asked=asked(seed)) for seed in range(3)]  # measured by nothing
    assert {name: len(row.runs) for name, row in named(records).items()} == {"lora": 3}
    records = [examples.record(settings={"seed": seed}, axes=(), chosen=None, asked=asked(1, rate)) for seed, rate in
               ((0, 0.1), (1, 0.1), (8, 0.3))]  # fmt: skip
    assert {name: len(row.runs) for name, row in named(records).items()} == {
        "lora optim.learning_rate=0.1": 2, "lora optim.learning_rate=0.3": 1}


def test_a_budget_in_epochs_is_one_budget_however_many_steps_the_data_has():
    records = [examples.record(settings={"task.train_limit": limit, "seed": 0}, axes=("task.train_limit",), chosen=None,
                           asked={"optim": {"epochs": 3.0, "steps": 0}}) for limit in (50, 200)]  # fmt: skip
    for record, steps in zip(records, (9, 38)):
        record["run_info"]["train_config"]["max_steps"] = steps
    assert {row.budget for row in rows_of(records)} == {"3 epochs of 16"}


def test_settings_that_are_numbers_are_sorted_as_numbers():
    """Of one label; labels stand best first, and so do settings that are words."""
    runs = [run_of(examples.record(label, settings={"method.r": r}, axes=["method.r"], chosen=None,
                                   test={"among_choices": accuracy}))
            for label, r, accuracy in (("lora", 16, 0.5), ("lora", 2, 0.4), ("lora", 4, 0.6), ("dora", 8, 0.7))]
    assert [row.name for row in rows(runs)] == ["dora", "lora r=2", "lora r=4", "lora r=16"]
    words = [run_of(examples.record(settings={"method.init": init}, axes=["method.init"], chosen=None,
                                    test={"among_choices": accuracy}))
             for init, accuracy in (("a", 0.4), ("b", 0.6))]
    assert [row.name for row in rows(words)] == ["lora init=b", "lora init=a"]
