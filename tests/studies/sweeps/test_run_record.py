"""peft's rows of a run: evaluations on the way, the end, the test; with metrics of which less is better."""

import json
from types import SimpleNamespace

import pytest

from configs import sweeps
from peft_jax.studies.comparison import run_of
from peft_jax.studies.sweeps.run_record import Outcome, _metric_rows, compose

CONFIG = SimpleNamespace(data=SimpleNamespace(batch_size=4), optim=SimpleNamespace(accumulate_steps=2))
ROWS = [{"step": step, "loss": 4.0 - step, "seconds": 2.0 * step, "tokens_per_second": 10.0, "memory": 100 * step,
         **({"eval_loss": 0.5, "eval_exact": 0.25} if step == 2 else {})} for step in (1, 2, 3)]


@pytest.mark.parametrize(("metric", "on_the_way", "last", "tested"), [
    ("exact", 0.25, 0.75, 0.7), ("-loss", -0.5, -0.2, -0.3)])
def test_evaluations_on_the_way_the_end_and_the_test(metric, on_the_way, last, tested):
    results, found = {"after": {"exact": 0.75, "loss": 0.2}}, {"test": {"exact": 0.7, "loss": 0.3}, "general": {}}
    rows = _metric_rows(CONFIG, results, found, {}, ROWS, metric)
    assert [row["step"] for row in rows] == [2, 3, 3]
    assert [row.get("valid accuracy") for row in rows] == [on_the_way, last, None]
    assert rows[2]["test accuracy"] == tested and rows[2]["train samples"] == 24
    assert rows[0]["train loss"] == 2.5 and rows[0]["mem allocated avg"] == 150 and rows[1]["train loss"] == 2.0


def test_the_metrics_before_training_are_kept_where_they_were_taken(tmp_path):
    config = sweeps.experiment_config("lora")
    cell = sweeps.cell(config, {"seed": 0}, "lora")
    (tmp_path / "runs" / cell.name).mkdir(parents=True)
    for before in ({"loss": 9.0, "probe_loss": 4.5}, {}):
        results = {"before": before, "after": {"loss": 0.5, "probe_loss": 5.0}}
        (tmp_path / "runs" / cell.name / "results.json").write_text(json.dumps(results))
        record = compose(tmp_path, cell, cell, "-loss", Outcome("2026-11-26T00:00:00+00:00", 1.0, ""))
        values = run_of(record).values
        assert values["value"] == -0.5 and values["validation.general"] == 5.0
        assert (values.get("before"), values.get("before.general")) == ((-9.0, 4.5) if before else (None, None))


def test_a_run_of_no_steps_has_no_rows():
    assert _metric_rows(CONFIG, {}, {"test": {}, "general": {}}, {}, [], "exact") == []
