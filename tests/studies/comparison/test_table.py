"""Tables: one for ours and peft's, within the width, at full precision where programs read it."""

import csv
import io
import json

import pytest

from peft_jax.studies.comparison import csv_table, markdown, read, summary, terminal, write
from tests.studies.comparison import examples


def lines_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_our_rows_and_those_of_peft_come_out_as_one_table(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "peft"
    for label in ("lora", "ia3"):
        write(ours, examples.record(label))
    theirs.mkdir()
    for name, accuracy in (("lora/llama-3.2-3B-rank32", 0.48), ("ia3/llama-3.2-3B-default", 0.31)):
        (theirs / f"{name.replace('/', '--')}.json").write_text(json.dumps(examples.peft_record(name, accuracy)))
    records = [*read(ours), *read(theirs)]
    methods = ["lora learning_rate=0.001", "ia3 learning_rate=0.001", "lora llama-3.2-3B-rank32",
               "ia3 llama-3.2-3B-default"]  # fmt: skip
    found = lines_of(csv_table(records))
    assert [line["method"] for line in found] == methods
    assert [line["metric"] for line in found] == ["among_choices", "among_choices", "accuracy", "accuracy"]
    assert [float(line["memory.observed.mean"]) for line in found] == [1.31e9, 1.1e9, 22e9, 22e9]
    assert found[2]["value.mean"] == "0.48" and found[2]["gain.mean"] == ""
    text = terminal(records)
    assert all(f"\n{method}  " in text for method in methods)
    assert "Llama-3.2-3B" in text and "SmolLM2-135M-Instruct" in text  # which model a number is of
    cells = [line.split(" | ") for line in markdown(records).splitlines() if line.startswith("| lora llama")]
    assert len(cells) == 4 and {"0.480", "Llama-3.2-3B"} <= set(cells[0])


@pytest.mark.parametrize("records", [examples.comparison(), examples.comparison(1), examples.hostile(),
                                     [examples.failed()],
                                     [examples.record(), examples.peft_record("x/" + "long-" * 60)]])  # fmt: skip
def test_the_terminal_has_eighty_columns_and_is_not_told_what_to_do(records):
    text = terminal(records)
    assert max(map(len, text.splitlines())) <= 80
    assert all(one.isprintable() for line in text.split("\n") for one in line)


def test_the_terminal_shows_each_number_once_with_its_spread():
    text = terminal([examples.record(seed=seed, memory={"observed": 1.5e9 + seed * 1e7}) for seed in range(3)])
    assert text.count("memory (GB)") == 1 and "1.51 ± 0.01" in text
    assert text.count("lora  ") == text.count("method  ")


def test_a_validation_metric_and_failures_say_so():
    records = [examples.record("ia3", chosen=False), examples.failed(error="out of memory\nat step 3"),
               examples.failed("full/x", error="", status="canceled")]  # fmt: skip
    for text in (terminal(records), markdown(records)):
        assert "(validation)" in text and "failed: out of memory at step 3" in text and "canceled" in text
    found = lines_of(csv_table(records))
    assert [line["status"] for line in found] == ["success", "failed", "canceled"]
    assert found[0]["measured_on"] == "validation" and found[1]["error"] == "out of memory\nat step 3"


def test_csv_keeps_every_digit():
    record = examples.record()
    (line,) = lines_of(csv_table([record]))
    assert float(line["value.mean"]) == record["peft_jax"]["test"]["among_choices"]
    assert float(line["latency.unmerged.token.mean"]) == record["peft_jax"]["latency"]["unmerged"]["token"]
    assert (line["trainable.mean"], line["value.std"], line["value.n"]) == ("921600", "", "1")


def test_markdown_is_not_broken_by_what_it_holds():
    text = markdown(examples.hostile())
    assert "<script" not in text and "\x1b" not in text
    (head, *body) = [line for line in text.splitlines() if line.startswith("| method")][:1] + [
        line for line in text.splitlines() if line.startswith("| &lt;script")][:1]  # fmt: skip
    assert body[0].replace("\\|", "").count("|") == head.count("|")


def test_the_summary():
    records = examples.comparison(seeds=2)
    found = json.loads(json.dumps(summary(records, "python run.py"), allow_nan=False))
    assert found["command"] == "python run.py" and found["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == set(examples.METHODS)
    lora, adapter = rows["lora"], rows["adapter"]
    assert lora["metric"] == "among_choices" and lora["value"]["n"] == 2
    assert lora["loss"]["mean"] == 1.1  # of the test, as the value
    assert lora["gain"]["mean"] == pytest.approx(lora["value"]["mean"] - 0.31)
    assert set(lora["forgetting"]) == {"newspaper", "amazon"} and set(lora["neighbours"]) == {"tweets"}
    assert lora["latency"]["merged_token"] == pytest.approx(0.01203 / 0.012)
    assert set(adapter["latency"]) == {"prefill", "token"}  # it cannot be merged
    assert lora["memory"] == {"observed": 1.31e9, "compiled": pytest.approx(1.31e9 * 0.93)}
    assert (lora["trainable"], lora["all"], lora["rate"], lora["adapter_bytes"]) == (
        921_600, 135_436_608, 1e-3, 3_686_400)  # fmt: skip
    assert found["failed"] == [
        {"name": "lora/smollm2-135m-lr1", "status": "failed", "error": "the loss is NaN at step 12"}]  # fmt: skip
