"""run.py on a classifier: an encoder without a head, a table with labels, every mode."""

import json
import shutil

import jax
import numpy as np
import pytest

import run
from peft_jax.hub.load import load_pretrained
from peft_jax.hub.save import save_pretrained
from peft_jax.models import Encoder, EncoderConfig

EXPERIMENT = "experiments/minilm_lora.py"

pytestmark = pytest.mark.usefixtures("at_the_root")


WORDS = ("dull", "bright")  # what tells one class from the other


def table(folder, columns, row):
    """A CSV file of 30 dull and 30 bright films, ``row(i, word)`` each."""
    path = folder / "films.csv"
    path.write_text("\n".join([columns, *(row(i, word) for i in range(30) for word in WORDS)]) + "\n")
    return path


@pytest.fixture(scope="module")
def arguments(tiny_tokenizer, tmp_path_factory):
    """A small run's flags, but for the workdir: dull films from bright ones."""
    folder = tmp_path_factory.mktemp("classes")
    model = Encoder(EncoderConfig(len(tiny_tokenizer), 16, 24, 2, 4, 64))
    save_pretrained(folder / "model", model, model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"],
                    tiny_tokenizer)
    films = table(folder, "sentence,label", lambda i, word: f"a {word} film number {i},{WORDS.index(word)}")
    settings = {"data.batch_size": 8, "mesh.data": 1, "optim.steps": 12, "optim.learning_rate": 3e-2,
                "eval.batch_size": 8,
                "method.r": 2, "log.tensorboard": False, "task.text_column": "sentence", "task.label_column": "label",
                "task.answer": "class", "task.validation_fraction": 0.3}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={EXPERIMENT}:model={folder / 'model'},task={films}", *overrides]


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
    (["--mode=generate", "--config.data.max_length=6", "--config.data.on_too_long=drop", "--prompt=dull",
      "--prompt=a dull film that goes on and on and on"], "a prompt has more tokens than data.max_length=6"),
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


@pytest.fixture(scope="module")
def words(arguments, tmp_path_factory):
    """A run's flags where labels are words, and no column is named; with the experiment's general text."""
    films = table(tmp_path_factory.mktemp("words"), "id,text,label", lambda i, word:
                  f"{i},a {word} film number {i},{'poor' if word == 'dull' else 'fine'}")
    kept = [flag for flag in arguments[1:] if "_column" not in flag and "task.answer" not in flag]
    return [arguments[0].split("task=")[0] + f"task={films}", *kept, "--config.eval.probe=newspaper"]


@pytest.fixture(scope="module")
def named(words, tmp_path_factory):
    """The workdir of a run whose classes have names."""
    folder = tmp_path_factory.mktemp("runs") / "named"
    assert run.main([*words, f"--workdir={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_words_in_the_column_label_are_classes_with_an_encoder(named):
    task = json.loads((named / "config.json").read_text())["task"]
    assert (task["answer"], task["label_names"], task["num_labels"]) == ("class", ["fine", "poor"], 2)
    results = json.loads((named / "results.json").read_text())
    assert results["after"].keys() == {"accuracy", "text_loss"} and results["after"]["accuracy"] > 0.9
    stated = json.loads((named / "adapter" / "adapter_config.json").read_text())
    assert stated["id2label"] == {"0": "fine", "1": "poor"} and stated["label2id"] == {"fine": 0, "poor": 1}


@pytest.mark.slow
def test_generate_tells_the_class_by_the_name_that_the_adapter_keeps(named, words, capsys, tmp_path):
    prompts = ["--prompt=a dull film number 7", "--prompt=a bright film number 7"]
    command = [*words, f"--workdir={named}", "--mode=generate", *prompts]
    assert run.main(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["adapter:"]] == ["'poor", "'fine"]
    assert len([line for line in lines if line[:1] == ["base:"]]) == 2
    assert lines[0] == ["a", "dull", "film", "number", "7"]
    stated = json.loads((named / "adapter" / "adapter_config.json").read_text())
    other = shutil.copytree(named / "adapter", tmp_path / "renamed")
    (other / "adapter_config.json").write_text(json.dumps(stated | {"id2label": {"0": "gut", "1": "schlecht"}}))
    assert run.main([*words, f"--workdir={named}", "--mode=generate", f"--adapters={other}", *prompts]) == 0
    assert "renamed: 'schlecht (" in capsys.readouterr().out


@pytest.mark.slow
def test_the_merged_classifier_keeps_the_names_and_needs_no_data(named, words):
    source = words[0].split("task=")[1]
    gone = [flag.replace(source, "gone.csv") for flag in words]
    assert run.main([*gone, f"--workdir={named}", "--mode=merge"]) == 0
    stated = json.loads((named / "merged" / "config.json").read_text())
    assert stated["id2label"] == {"0": "fine", "1": "poor"}
    assert load_pretrained(named / "merged")[0].config.head.labels == ("fine", "poor")


def test_numbers_that_are_not_whole_are_scores(words, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label\na,0.5\nb,1.5\n")
    command = [words[0].split("task=")[0] + f"task={tmp_path / 'a.csv'}", *words[1:]]
    assert run.main([*command, "--mode=show"]) == 0
    shown = capsys.readouterr().out
    assert "a head tells the column 'label': a number" in shown and "label is learnt: 1.5" in shown


def test_show_needs_no_weights(words, tmp_path, capsys):
    source = words[0].split("model=")[1].split(",")[0]
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert run.main([words[0].replace(source, str(folder)), *words[1:], "--mode=show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a head tells the column 'label': 2 classes (fine, poor)"
    assert lines[-1] == "columns that are not used: id" and max(map(len, lines)) <= 80
    assert sum(line.startswith("example ") for line in lines) == 3


@pytest.mark.parametrize("content, message", [
    ("text,label\na,same\nb,same\n", "each label in the column 'label' is 'same'"),
    ("text,title\na,b\nc,d\n", "reads and does not write"),
    ("text,label\na,fine\nb,poor\nc,\n", "row 3: column 'label' holds '', which is no class"),
])
def test_labels_that_cannot_be_told_are_one_line(words, tmp_path, content, message, capsys):
    (tmp_path / "a.csv").write_text(content)
    command = [words[0].split("task=")[0] + f"task={tmp_path / 'a.csv'}", *words[1:], f"--workdir={tmp_path / 'run'}"]
    assert run.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_language_model_says_that_the_label_is_not_used(words, tiny_folder, capsys):
    command = [f"--config=experiments/lora.py:model={tiny_folder},task={words[0].split('task=')[1]}", "--mode=show",
               "--config.task.validation_fraction=0.1"]
    assert run.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "columns that are not used: id, label",
        "to learn 'label', take experiments/minilm_lora.py, or see docs/data.md"]


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
