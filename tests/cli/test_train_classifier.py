"""run.py on a classifier: an encoder without a head, a table with labels, every mode."""

import json

import jax
import numpy as np
import pytest

import run
from peft_jax.hub.load import load_pretrained
from peft_jax.hub.save import save_pretrained
from peft_jax.models import Encoder, EncoderConfig

EXPERIMENT = "experiments/minilm_lora.py"

pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture(scope="module")
def arguments(tiny_tokenizer, tmp_path_factory):
    """A small run's flags, but for the workdir: dull films from bright ones."""
    folder = tmp_path_factory.mktemp("classes")
    model = Encoder(EncoderConfig(len(tiny_tokenizer), 16, 24, 2, 4, 64))
    save_pretrained(folder / "model", model, model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"],
                    tiny_tokenizer)
    rows = [f"a {word} film number {i},{label}" for i in range(30) for label, word in enumerate(("dull", "bright"))]
    (folder / "films.csv").write_text("sentence,label\n" + "".join(f"{row}\n" for row in rows))
    settings = {"data.batch_size": 8, "mesh.data": 1, "optim.steps": 12, "optim.learning_rate": 3e-2,
                "eval.batch_size": 8,
                "method.r": 2, "log.tensorboard": False, "task.text_column": "sentence", "task.label_column": "label",
                "task.answer": "class", "task.validation_fraction": 0.3}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={EXPERIMENT}:model={folder / 'model'},task={folder / 'films.csv'}", *overrides]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_training_learns_the_classes(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results["before"].keys() == results["after"].keys() == {"accuracy", "text_loss"}
    assert results["after"]["accuracy"] > 0.9 and results["after"]["text_loss"] < 0.8 * results["before"]["text_loss"]
    stated = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert stated["task_type"] == "SEQ_CLS" and stated["modules_to_save"] == ["classifier"]


@pytest.mark.slow
def test_evaluating_again_finds_the_same(trained, arguments):
    assert run.main([*arguments, f"--workdir={trained}", "--mode=eval"]) == 0
    found = json.loads((trained / "eval.json").read_text())
    results = json.loads((trained / "results.json").read_text())
    assert found["adapter"] == pytest.approx(results["after"], rel=1e-4)
    assert found["base"] == pytest.approx(results["before"], rel=1e-4)


@pytest.mark.slow
def test_the_merged_classifier_opens(trained, arguments):
    assert run.main([*arguments, f"--workdir={trained}", "--mode=merge"]) == 0
    model, params = load_pretrained(trained / "merged")
    assert model.config.head.pooling == "mean" and "classifier" in params


@pytest.mark.slow
def test_a_regression_runs(arguments, tmp_path):
    assert run.main([*arguments, f"--workdir={tmp_path}", "--config.task.answer=score"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"]["rmse"] < results["before"]["rmse"] and results["after"].keys() == {"rmse", "spearman"}


@pytest.mark.parametrize("more, message", [
    (["--mode=generate"], "answered by a head, which writes no text"),
    (["--config.eval.probe=newspaper"], "set --config.eval.probe="),
    (["--config.task.answer=klass"], "did you mean class"),
    (["--config.task.label_column="], "needs --config.task.text_column and --config.task.label_column"),
    (["--config.task.pooling=max"], "--config.task.pooling=max"),
    (["--config.task.num_labels=1"], "expected a whole number from 0 to 0"),
    (["--config.task.answer=word", "--config.task.label_column=", "--overwrite"], "reads and does not write"),
])
def test_errors_are_one_line(trained, arguments, more, message, capsys):
    assert run.main([*arguments, f"--workdir={trained}", *more, "--overwrite"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # after the progress bars of `datasets`
    assert said.startswith("error: ") and message in said and (trained / "results.json").exists()


def test_a_language_model_has_no_classes(arguments, tiny_folder, tmp_path, capsys):
    other = [part.split(":")[0] + f":model={tiny_folder},task=" + part.split("task=")[1] if part.startswith("--config=")
             else part for part in arguments]
    assert run.main([*other, f"--workdir={tmp_path}"]) == 2
    assert "without a classification head" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_prompt_in_packed_rows_learns_the_classes(arguments, tmp_path, pooling):
    """Each text with virtual tokens of its own; evaluated one text to a row, from the saved adapter the same."""
    command = [*(flag.replace(EXPERIMENT, "experiments/prompt.py") for flag in arguments if "method.r" not in flag),
               "--config.method.num_virtual_tokens=3", "--config.method.modules_to_save=classifier",
               "--config.data.rows=2", "--config.eval.probe=", f"--config.task.pooling={pooling}"]
    assert run.main([*command, f"--workdir={tmp_path}"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"]["text_loss"] < results["before"]["text_loss"] and results["after"]["accuracy"] > 0.9
    assert run.main([*command, f"--workdir={tmp_path}", "--mode=eval"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["adapter"] == pytest.approx(results["after"], rel=1e-4)
