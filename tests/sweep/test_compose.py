"""peft's rows of a run: evaluations on the way, the end, the test; with metrics of which less is better."""

from types import SimpleNamespace

import pytest

from peft_jax.sweep.compose import _metric_rows

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


def test_a_run_of_no_steps_has_no_rows():
    assert _metric_rows(CONFIG, {}, {"test": {}, "general": {}}, {}, [], "exact") == []
