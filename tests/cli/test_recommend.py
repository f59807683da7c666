"""--mode=recommend: from the command line and a model's config alone to a table and recommend.json."""

import json

import pytest

import run
from peft_jax.cli import modes

pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture
def asked(tiny_folder, tmp_path):
    """``asked(*options)``: the command line for a model that has a config.json and no weights."""
    model = tmp_path / "sizes"
    model.mkdir()
    (model / "config.json").write_text((tiny_folder / "config.json").read_text())
    fixed = [f"--config=experiments/lora.py:model={model}", "--config.data.max_length=32", "--mode=recommend",
             f"--workdir={tmp_path / 'run'}"]
    return lambda *options: [*fixed, *options]


@pytest.mark.slow
def test_a_table_is_shown_and_written(asked, tmp_path, capsys):
    figures = tmp_path / "table.json"
    figures.write_text(json.dumps({"command": "python run.py --config=experiments/compare.py",
                                   "rows": [{"method": "prefix", "gain": {"mean": 0.2}}]}))
    command = run.parse_command(asked("--config.recommend.memory_gb=8", "--config.recommend.tasks=2",
                                      f"--config.recommend.figures={figures}"))
    assert modes.run(command) == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "run" / "recommend.json").read_text())
    assert "1. prefix (num_virtual_tokens=20): fits" in shown
    assert 'The rule of the article "Full Fine-Tuning vs PEFT": LoRA with rank 16' in shown
    assert [one["method"] for one in written["choices"]] == ["prefix", "lora", "qlora", "houlsby", "ia3", "full"]
    assert all(reason["source"] for one in written["choices"] for reason in one["reasons"])
    assert written["asked"]["weights, if plain, in"] == "float32" and "AdamW" in shown
    assert written["asked"]["memory of a device"] == 8 * 10**9 and written["article"]["choice"] == "lora"


@pytest.mark.slow
def test_packed_rows_may_be_longer_than_the_positions_as_in_plans(asked, tmp_path, capsys):
    long = "--config.data.row_length=272"  # the model has 256 positions, each of the texts in a row at most 32
    assert run.main(asked(long)) == 0
    assert json.loads((tmp_path / "run" / "recommend.json").read_text())["asked"]["batch"] == "1 x 272 tokens"


def test_a_checkpoint_that_is_quantised_is_no_plain_base(asked, tiny_folder, tmp_path, capsys):
    given = json.loads((tiny_folder / "config.json").read_text())
    given["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    command = asked()
    (tmp_path / "sizes" / "config.json").write_text(json.dumps(given))
    assert run.main(command) == 2 and "holds quantised weights" in capsys.readouterr().err


@pytest.mark.parametrize("option, words", [
    ("memory_gb=0", "recommend.memory_gb=0.0"), ("memory_gb=1e300", "recommend.memory_gb=1e+300"),
    ("memory_gb=-3", "recommend.memory_gb"), ("devices=0", "recommend.devices"),
    ("complexity=hard", "recommend.complexity"), ("latency=some", "recommend.latency"),
    ("figures=nowhere.json", "No such file"),
    ("figures=experiments", "Is a directory"), ("figures=configs/sizes/llama3_8b/config.json", "lacks rows"),
    ("memory=3", "did you mean --config.recommend.memory_gb")])
def test_what_cannot_be_meant_is_one_line(asked, tmp_path, capsys, option, words):
    assert run.main(asked(f"--config.recommend.{option}")) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
