"""run.py from end to end, on a tiny random model and a small data set written here: every mode, every way to fail."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import run
from peft_jax.core import tree
from peft_jax.data import Batches
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.metrics_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
LORA = "experiments/lora.py"
pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture(scope="module")
def data(films):
    return films(30)


@pytest.fixture(scope="module")
def arguments(tiny_folder, data):
    """A small run's flags, but for the workdir."""
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 6, "optim.learning_rate": 1e-2,
                "checkpoint.every": 4,
                "eval.batch_size": 4, "eval.probe": "", "method.r": 4, "log.tensorboard": False,
                "task.prompt_column": "prompt", "task.completion_column": "completion", "task.validation_fraction": 0.2,
                "generate.num_prompts": 2, "generate.max_new_tokens": 3}  # fmt: skip
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={LORA}:model={tiny_folder},task={data}", *overrides]


@pytest.fixture(scope="module")
def trained(arguments, tmp_path_factory):
    """The workdir of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run.main([*arguments, f"--workdir={folder}"]) == 0
    return folder


def weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")


def fails(capsys, argv, *words):
    """The command line ends with exit code 2 and one line on standard error that has all of these words."""
    capsys.readouterr()
    assert run.main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], lines
    for word in words:
        assert word in errors[0]


# What a run leaves behind


@pytest.mark.slow
def test_training_leaves_a_peft_adapter_metrics_and_results(trained, capsys):
    assert json.loads((trained / "adapter" / "adapter_config.json").read_text())["r"] == 4
    files = sorted(path.name for path in (trained / "adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    rows = read_metrics(trained / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    results = json.loads((trained / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    assert json.loads((trained / "config.json").read_text())["method"]["target_modules"] == ["q_proj", "v_proj"]
    assert not list(trained.rglob("*.tmp"))


def test_a_finished_run_says_so_and_trains_nothing(trained, arguments, capsys):
    stamp = (trained / "metrics.jsonl").stat().st_mtime_ns
    assert run.main([*arguments, f"--workdir={trained}"]) == 0
    out = capsys.readouterr().out
    assert "nothing is left to train" in out and "held-out loss" in out and "trainable" in out
    assert (trained / "metrics.jsonl").stat().st_mtime_ns == stamp


def test_eval_compares_base_and_adapter(trained, arguments, capsys):
    assert run.main([*arguments, f"--workdir={trained}", "--mode=eval", "--config.model.remat=True"]) == 0
    assert "base" in (out := capsys.readouterr().out) and "adapter" in out
    found, results = (json.loads((trained / name).read_text()) for name in ("eval.json", "results.json"))
    assert found["base"]["loss"] == pytest.approx(results["before"]["loss"], rel=1e-5)
    assert found["adapter"]["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_merge_writes_a_folder_that_transformers_reads_with_the_adapter_in_it(trained, arguments, tiny_folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    assert run.main([*arguments, f"--workdir={trained}", "--mode=merge"]) == 0
    load = transformers.AutoModelForCausalLM.from_pretrained
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "merged")
    ids = torch.tensor([tokenizer("a dull film, number 3, is")["input_ids"]])
    with torch.no_grad():
        merged, base = load(trained / "merged").eval()(ids).logits, load(tiny_folder).eval()(ids).logits
        adapted = peft.PeftModel.from_pretrained(load(tiny_folder), trained / "adapter").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 1e-2


@pytest.mark.slow
def test_generate_continues_given_prompts_and_held_out_ones(trained, arguments, capsys):
    mode = [*arguments, f"--workdir={trained}", "--mode=generate", "--config.model.dtype=bfloat16"]
    assert run.main([*mode, "--prompt=a bright film is", "--prompt", "a dull one, is"]) == 0
    out = capsys.readouterr().out
    assert out.count("  base:") == out.count("  adapter:") == 2
    assert "a bright film is\n" in out and "a dull one, is\n" in out
    assert run.main(mode) == 0
    assert capsys.readouterr().out.count(", number ") == 2


# Stopping, resuming, starting again


def interrupt(monkeypatch, command):
    """Run a command and press Ctrl-C while its third step is under way."""
    usual = Batches.at

    def interrupted_at(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return usual(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "at", interrupted_at)
        assert run.main(command) == 130


@pytest.mark.slow
def test_a_run_interrupted_before_its_first_line_of_log_evaluates_as_it_is_asked_to(
        arguments, tmp_path, monkeypatch, capsys):
    command = [*arguments, "--config.log.every=10", f"--workdir={tmp_path}"]
    interrupt(monkeypatch, command)
    assert "stopped after step 3 of 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "before.json").read_text())["eval"]["limit"] == 200
    assert run.main([*command, "--config.eval.limit=2"]) == 0
    before = json.loads((tmp_path / "before.json").read_text())
    assert before["eval"]["limit"] == 2
    assert json.loads((tmp_path / "results.json").read_text())["before"] == before["metrics"]
    assert run.main([*arguments, "--config.eval.limit=2", f"--workdir={tmp_path / 'new'}"]) == 0  # never interrupted
    assert json.loads((tmp_path / "new" / "before.json").read_text()) == before
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [3, 6]


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_ends_bit_identical(trained, arguments, tmp_path, monkeypatch, capsys):
    command = [*arguments, "--config.eval.before=False", f"--workdir={tmp_path}"]  # which `trained` has
    interrupt(monkeypatch, command)
    assert "stopped after step 3 of 6" in capsys.readouterr().out
    assert not (tmp_path / "adapter").exists()
    assert run.main(command) == 0
    assert "after step 3 of 6" in capsys.readouterr().out
    whole, resumed = weights(trained), weights(tmp_path)
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], resumed[name])
    losses = [[(row["step"], row["loss"]) for row in read_metrics(f / "metrics.jsonl")] for f in (trained, tmp_path)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_another_configuration_is_refused_unless_told_to_overwrite(trained, arguments, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    other = [*arguments, f"--workdir={folder}", "--config.method.r=2", "--config.optim.steps=1"]
    fails(capsys, other, "method.r was 4, now 2", "optim.steps was 6, now 1", "--overwrite")
    assert run.main([*other, "--overwrite"]) == 0
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1]


# Errors: one clear line, exit code 2, nothing half-written


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["--config=experiments/lora.py"]),
        (["--config=experiments/lorra.py"], ["did you mean experiments/lora.py"]),
        ([f"--config={LORA}:modle=x"], ["model, task"]),
        ([f"--config={LORA}:model=smollm2-135n"], ["did you mean smollm2-135m"]),
        ([f"--config={LORA}", "--config.method.rr=8"], ["did you mean --config.method.r?"]),
        ([f"--config={LORA}", "--config.method.r=abc"], ["--config.method.r=abc: expected int, such as 16"]),
        ([f"--config={LORA}", "--mode=evil"], ["did you mean eval?"]),
        ([f"--config={LORA}", "--mdoe=eval"], ["did you mean mode?"]),
        ([f"--config={LORA}", "eval"], ["unknown argument eval"]),
        ([f"--config={LORA}", "--config.eval.probe=newspapr"], ["did you mean newspaper?"]),
        ([f"--config={LORA}", "--config.optim.epochs=2", "--config.optim.steps=5"], ["set exactly one"]),
        ([f"--config={LORA}", "--config.optim.b2=1.0"], ["optim.b2", "between 0 and 1"]),
        ([f"--config={LORA}", "--config.optim.warmup_ratio=nan"], ["optim.warmup_ratio"]),
        ([f"--config={LORA}", "--config.seed=-1"], ["seed", "at least 0"]),
        ([f"--config={LORA}", "--config.task.train_limit=-3"], ["task.train_limit"]),
        ([f"--config={LORA}", "--config.task.prompt_template=Review: {tex}"], ["prompt_template", "{text}"]),
    ],
)
def test_a_wrong_command_line(capsys, argv, words):
    fails(capsys, argv, *words)


@pytest.mark.parametrize(
    "argument, code, word", [("--help", 0, "--config.method.r="), ("--config.method.rr=8", 2, "method.r?")]
)
def test_help_and_a_wrong_key_are_answered_before_jax_is_imported(argument, code, word):
    script = "import sys, run; code = run.main(); print('jax' in sys.modules, file=sys.stderr); sys.exit(code)"
    command = [sys.executable, "-c", script, f"--config={LORA}", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "False", "jax was imported"
    assert word in done.stdout + done.stderr


def test_without_an_adapter_there_is_nothing_to_evaluate(arguments, tmp_path, capsys):
    for mode in ("eval", "merge", "generate"):
        fails(capsys, [*arguments, f"--workdir={tmp_path}", f"--mode={mode}"], "no adapter", "train one first")


def test_an_adapter_of_another_model_is_refused(trained, arguments, capsys):
    other = [*arguments, "--config.model.source=else/where", f"--workdir={trained}", "--mode=merge"]
    fails(capsys, other, "model.source was", "else/where")


@pytest.mark.parametrize(
    "change, words",
    [
        (["--config.method.target_modules=q_pro"], ["q_pro", "did you mean q_proj"]),
        (["--config.method.lora_dropout=1.5"], ["lora_dropout"]),
        (["--config.method.target_modules=5"], ["target_modules=5"]),
        (["--config.method.layers_to_transform=1.5"], ["layers_to_transform=1.5"]),
        (["--config.method.rank_pattern=5"], ["rank_pattern=5", "dict"]),
        (["--config.method.alpha_pattern={'q_proj': 'x'}"], ["alpha_pattern['q_proj']='x'"]),
        (["--config.task.prompt_column=nothing"], ["nothing"]),
        (["--config.data.max_length=3"], ["max_length"]),
        (["--config.task.validation_fraction=0"], ["validation_fraction"]),
        (["--config.eval.probe=newspaper", "--config.task.source=none.jsonl"], ["none.jsonl"]),
    ],
)
def test_what_is_found_before_training_leaves_no_workdir(arguments, tmp_path, capsys, change, words):
    fails(capsys, [*arguments, *change, f"--workdir={tmp_path / 'run'}"], *words)
    assert not (tmp_path / "run").exists()


def test_empty_data_unknown_model_and_a_workdir_that_is_a_file(arguments, tiny_folder, data, tmp_path, capsys):
    rest = arguments[1:]
    (tmp_path / "empty.jsonl").write_text("")
    config = [f"--config={LORA}:model={tiny_folder},task={tmp_path / 'empty.jsonl'}", *rest]
    fails(capsys, [*config, f"--workdir={tmp_path / 'run'}"], "empty.jsonl is empty")
    (tmp_path / "model").mkdir()
    for file in tiny_folder.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    described = json.loads((tiny_folder / "config.json").read_text())
    described |= {"model_type": "lama", "architectures": ["Lama"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(described))
    config = [f"--config={LORA}:model={tmp_path / 'model'},task={data}", *rest]
    fails(capsys, [*config, f"--workdir={tmp_path / 'run'}"], "lama")
    fails(capsys, [*arguments, f"--workdir={tmp_path / 'empty.jsonl' / 'run'}"], "is a file, not a folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_update_that_is_not_finite_keeps_the_last_good_checkpoint(arguments, tmp_path, capsys):
    wild = {"optim.learning_rate": 1e38, "optim.clip_norm": 0, "optim.warmup_ratio": 0.3, "checkpoint.every": 1,
            "eval.before": False}  # fmt: skip
    command = [*arguments, *(f"--config.{key}={value}" for key, value in wild.items()), f"--workdir={tmp_path}"]
    fails(capsys, command, "training broke at step 2", "update_norm", "the checkpoint of step 1 is kept")
    assert not (tmp_path / "adapter").exists()
    with closing(Checkpoints(tmp_path / "checkpoints", 2)) as checkpoints:
        kept = checkpoints.manager.restore(1)["trainable"]
    assert all(np.isfinite(leaf).all() for leaf in tree.flatten(kept).values())


@pytest.mark.slow
def test_a_last_update_that_is_not_finite_is_no_success(arguments, tmp_path, capsys):
    wild = {"optim.steps": 1, "optim.warmup_ratio": 0, "optim.learning_rate": 1e38, "optim.clip_norm": 0,
            "eval.before": False}  # fmt: skip
    command = [*arguments, *(f"--config.{key}={value}" for key, value in wild.items()), f"--workdir={tmp_path}"]
    fails(capsys, command, "training broke at step 1", "no checkpoint was written yet")
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "results.json").exists()


def test_a_bug_keeps_its_traceback(arguments, monkeypatch, tmp_path):
    def buggy(self, step):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Batches, "at", buggy)
    with pytest.raises(RuntimeError, match="a bug"):
        run.main([*arguments, "--config.eval.before=False", f"--workdir={tmp_path}"])
