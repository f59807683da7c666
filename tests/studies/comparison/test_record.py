"""Records on disk: ours and peft's, whole, damaged, or never written."""

import json
import math

import numpy as np
import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.studies.comparison import read, report, run_of, write
from peft_jax.studies.comparison.runs import values_of
from tests.studies.comparison import examples


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = examples.record()
    path = write(tmp_path / "results", record)
    assert path.name == "lora--smollm2-135m-learning_rate0.001-seed0.json"
    assert read(tmp_path / "results") == [record]
    assert list(path.parent.iterdir()) == [path]


def test_numbers_that_json_lacks_are_null_and_count_as_not_measured(tmp_path):
    record = examples.record(loss=[[1, math.nan], [2, np.float32(0.5)]], memory={"observed": math.inf})
    record["peft_jax"]["test"]["among_choices"] = math.nan
    path = write(tmp_path, record)
    strict = json.loads(path.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert strict["peft_jax"]["loss"] == [[1, None], [2, 0.5]]
    run = run_of(read(tmp_path)[0])
    assert run.measured_on == "validation" and "test" not in run.values and "gain" not in run.values
    assert run.values["memory.observed"] == record["train_info"]["accelerator_memory_max"]
    assert run.loss == [(1, None), (2, 0.5)]


@pytest.mark.parametrize("change, words", [
    ({"run_info": {}}, "lacks run_info.experiment_name"),
    ({"run_info": {"experiment_name": "../"}}, "lacks run_info.experiment_name"),
    ({"train_info": []}, r"train_info is \[\], not a JSON object"),
    ({"train_info": {"num_trainable_params": "many"}}, 'train_info.num_trainable_params is "many", not a number'),
    ({"train_info": {"metrics": 3}}, "train_info.metrics is 3, not a list"),
    ({"peft_jax": {"loss": [1, 2]}}, r"peft_jax.train.loss is \[1, 2\], not a list of \[step, loss\]"),
    ({"peft_jax": {"cell": {"settings": "r=8"}}}, 'peft_jax.cell.settings is "r=8", not a JSON object'),
    ({"meta_info": {"sha": {1}}}, "cannot be written as JSON"),
])  # fmt: skip
def test_a_record_that_could_not_be_read_back_is_not_written(tmp_path, change, words):
    with pytest.raises(PeftJaxError, match=words):
        write(tmp_path, examples.record() | change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, words", [
    ("", "Expecting value"), ('{"run_info": {"experiment', "Unterminated string"), ("[1]", "not a JSON object"),
    ('{"rows": []}', "lacks run_info.experiment_name"), ("[" * 100_000, "recursion"), ("\udcff", "decode"),
])  # fmt: skip
def test_a_damaged_file_is_a_failed_run_that_names_it_and_the_others_load(tmp_path, text, words):
    write(tmp_path, examples.record())
    (tmp_path / "ia3--tiny-seed0.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    damaged, whole = map(run_of, read(tmp_path))
    assert whole.finished and not damaged.finished
    assert damaged.name == "ia3/tiny-seed0" and damaged.label == "ia3"
    assert str(tmp_path / "ia3--tiny-seed0.json") in damaged.error and words in damaged.error


EDITED = [
    (lambda record: record.update(meta_info=[]), "meta_info is [], not a JSON object"),
    (lambda record: record["meta_info"].update(model_info=3), ""),
    (lambda record: record["run_info"]["train_config"].update(model_id="\ud800"), "surrogates not allowed"),
    (lambda record: record["peft_jax"]["cell"].update(axes=[["a"], 1]), ""),
]


@pytest.mark.slow
def test_records_that_someone_edited_cost_the_report_nothing_else(tmp_path):
    write(tmp_path / "results", examples.record("ia3"))
    for number, (change, _) in enumerate(EDITED):
        record = examples.record()
        change(record)
        (tmp_path / "results" / f"lora--edited-{number}.json").write_text(json.dumps(record))
    records = read(tmp_path / "results")
    whole, *edited = map(run_of, records)
    assert whole.finished and len(edited) == len(EDITED)
    for run, (_, words) in zip(edited, EDITED):
        assert run.finished == (not words) and words in run.error
    report(tmp_path, records)


def test_a_folder_without_records_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(PeftJaxError, match="holds no records of runs"):
            read(folder)


@pytest.mark.parametrize("memory", ["accelerator_memory_max", "cuda_memory_max"])
def test_a_record_of_peft(memory):
    run = run_of(examples.peft_record(memory=memory))
    assert (run.label, run.variety, run.metric, run.measured_on) == (
        "lora", "llama-3.2-3B-rank32", "accuracy", "test")  # fmt: skip
    assert run.values == {
        "test": 0.48, "value": 0.48, "validation": 0.4, "trainable": 9_175_040, "all": 3_221_924_864,
        "share": pytest.approx(100 * 9_175_040 / 3_221_924_864), "rate": 1e-4, "memory": 22e9, "memory.observed": 22e9,
        "adapter_bytes": 36_700_160,
        "tokens_per_second": 950.0, "seconds": 100.0, "forgetting.general": 0.51,
    }  # fmt: skip
    assert run.loss == [(25, 1.75), (50, 1.5), (75, 1.25), (100, 1.0)]


def test_differences_and_ratios():
    values = values_of({"peft_jax": {
        "metric": "exact", "test": {"exact": 0.75}, "validation": {"exact": 0.5}, "base_test": {"exact": 0.25},
        "general": {"news": {"before": 4.0, "after": 4.5}, "lost": {"before": 4.0}},
        "neighbours": {"tweets": {"before": 0.5, "after": 0.25}},
        "latency": {"base": {"prefill": 2.0, "token": 0.0}, "unmerged": {"prefill": 3.0, "token": 1.0}, "merged": None},
    }})  # fmt: skip
    assert values == {
        "test": 0.75, "validation": 0.5, "value": 0.75, "base": 0.25, "gain": 0.5, "forgetting.news": 0.5,
        "neighbour.tweets": -0.25, "latency.base.prefill": 2.0, "latency.base.token": 0.0,
        "latency.unmerged.prefill": 3.0, "latency.unmerged.token": 1.0, "ratio.unmerged.prefill": 1.5,
    }  # fmt: skip


def test_a_run_without_a_status_is_not_taken_for_a_success():
    record = examples.record()
    del record["train_info"]["status"]
    assert not run_of(record).finished
