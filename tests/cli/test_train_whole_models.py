"""run.py with methods that train the model's own leaves: what is saved, and evaluation during training."""

import json

import numpy as np
import pytest

import run
from peft_jax import load_pretrained
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.quant import is_leaf
from peft_jax.train.metrics_log import read_metrics

pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture(scope="module")
def arguments(tiny_folder, films):
    """``arguments(experiment, **settings)``: a small run's flags, but for the workdir. An epoch has 3 steps."""
    data = films(15)

    def make(experiment, **settings):
        small = {"mesh.data": 1, "data.batch_size": 4, "optim.accumulate_steps": 2, "optim.steps": 0, "optim.epochs": 2,
                 "optim.learning_rate": 1e-2, "eval.batch_size": 4, "eval.probe": "", "log.tensorboard": False,
                 "task.prompt_column": "prompt", "task.completion_column": "completion",
                 "task.validation_fraction": 0.2, "generate.max_new_tokens": 3}  # fmt: skip
        overrides = [f"--config.{key}={value}" for key, value in (small | settings).items()]
        return [f"--config=experiments/{experiment}.py:model={tiny_folder},task={data}", *overrides]

    return make


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The flags of a finished run of full fine-tuning in bfloat16, and its workdir."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    command = [*arguments("full"), f"--workdir={folder}"]
    assert run.main(command) == 0
    return command, folder


@pytest.mark.slow
def test_a_full_run_saves_a_model_and_evaluates_each_epoch(whole, tiny_model):
    _, folder = whole
    results = json.loads((folder / "results.json").read_text())
    assert results["trainable"] == results["all"] == tree.count(tiny_model[1])
    assert results["after"]["loss"] < results["before"]["loss"]
    assert results["adapter"] == str(folder / "model") and not (folder / "adapter").exists()
    rows = read_metrics(folder / "metrics.jsonl")
    steps = results["steps"]
    assert [row["step"] for row in rows if "eval_loss" in row] == [steps // 2, steps]
    assert rows[-1]["eval_loss"] == results["after"]["loss"] < rows[0]["eval_loss"] < results["before"]["loss"]
    saved = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == [steps // 2, steps]
    _, params = load_pretrained(folder / "model", dtype="bfloat16")
    assert {leaf.dtype.name for leaf in tree.flatten(params).values()} == {"bfloat16"}
    assert json.loads((folder / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_eval_and_generate_find_the_model(whole, capsys):
    """What was saved is the float32 leaves rounded to the base's bfloat16, in which the model computes anyway."""
    command, folder = whole
    assert run.main([*command, "--mode=eval"]) == 0
    found, results = (json.loads((folder / name).read_text()) for name in ("eval.json", "results.json"))
    assert found["base"]["loss"] == pytest.approx(results["before"]["loss"], rel=1e-5)
    assert found["model"]["loss"] == pytest.approx(results["after"]["loss"], rel=2e-2)
    capsys.readouterr()
    assert run.main([*command, "--mode=generate", "--prompt=a bright film is"]) == 0
    out = capsys.readouterr().out
    assert "  base:  '" in out and "  model: '" in out


@pytest.mark.slow
def test_export_is_merge_and_writes_where_it_is_told(whole, arguments, tmp_path, tiny_folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    command, folder = whole
    assert run.main([*command, "--mode=export", f"--output={tmp_path / 'out'}"]) == 0
    assert run.main([*command, "--mode=merge"]) == 0
    read = [transformers.AutoModelForCausalLM.from_pretrained(path).eval() for path in
            (tmp_path / "out", folder / "merged", folder / "model", tiny_folder)]
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a dull film")["input_ids"]])
    with torch.no_grad():
        exported, merged, trained, base = (model(ids).logits.float() for model in read)
    torch.testing.assert_close(exported, merged, rtol=0, atol=0)
    torch.testing.assert_close(exported, trained, rtol=0, atol=0)
    assert (exported - base).abs().max() > 0.1


def test_output_is_for_export_alone_and_not_the_base_model(whole, tiny_folder, capsys):
    command, _ = whole
    with pytest.raises(PeftJaxError, match="--output is for --mode=merge and export"):
        run.parse_command([*command, "--output=somewhere"])
    assert run.main([*command, "--mode=export", f"--output={tiny_folder}"]) == 2
    assert "is the base model itself" in capsys.readouterr().err


@pytest.mark.slow
def test_a_part_is_an_adapter_that_merges(arguments, tmp_path):
    """The last layer alone, with an adapter file of that layer."""
    command = [*arguments("full", **{"method.last_n_layers": 1, "model.param_dtype": "float32",
                                     "model.dtype": "float32"}), f"--workdir={tmp_path}"]  # fmt: skip
    assert run.main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["adapter"] == str(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["last_n_layers"] == 1
    assert run.main([*command, "--mode=eval"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["adapter"]["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)
    assert run.main([*command, "--mode=merge"]) == 0
    tuned, base = (tree.flatten(load_pretrained(path)[1]) for path in (
        tmp_path / "merged", json.loads((tmp_path / "config.json").read_text())["model"]["source"]))
    same = [np.array_equal(*pair) for pair in zip(tuned["layers/mlp/up_proj/kernel"],
                                                  base["layers/mlp/up_proj/kernel"])]
    assert same == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("experiment, settings", [
    ("bitfit", {}), ("ln_tuning", {}), ("trainable_tokens", {"method.token_indices": "5,6,7"})])
def test_the_other_experiments_train_save_and_load(arguments, tmp_path, capsys, experiment, settings):
    command = [*arguments(experiment, **settings), f"--workdir={tmp_path}"]
    assert run.main(command) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert run.main([*command, "--mode=eval"]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["adapter"]["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)
    assert found["adapter"]["loss"] != found["base"]["loss"]
    code = run.main([*command, "--mode=export", f"--output={tmp_path / 'out'}"])
    assert code == (2 if experiment == "bitfit" else 0)  # a Llama has no place for the biases that were added
    assert (tmp_path / "out").exists() == (code == 0)


@pytest.mark.slow
def test_a_prompt_and_a_prefix_of_a_text_begin_as_that_text_in_front(arguments, tmp_path):
    """So their losses before training are equal; after it both are better."""
    text = {"method.num_virtual_tokens": 5, "optim.epochs": 1, "data.batch_size": 12}
    texts = {"prompt": {"method.prompt_tuning_init": "TEXT", "method.prompt_tuning_init_text": "In one word, it is"},
             "prefix": {"method.prefix_init_text": "In one word, it is"}}
    found = {}
    for name, more in texts.items():
        assert run.main([*arguments(name, **text, **more), f"--workdir={tmp_path / name}"]) == 0
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
        assert found[name]["after"]["loss"] < found[name]["before"]["loss"]
    assert found["prompt"]["before"]["loss"] == pytest.approx(found["prefix"]["before"]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_on_a_quantised_base(arguments, tmp_path, capsys):
    """Evaluated again it is the same, and merged it is plain weights, or with --requantize quantised ones."""
    small = {"method.quantize.block_size": 16, "method.lora.r": 2, "model.dtype": "float32",
             "model.param_dtype": "float32", "optim.epochs": 1}
    command = [*arguments("qlora", **small), f"--workdir={tmp_path}"]
    assert run.main(command) == 0 and run.main([*command, "--mode=eval"]) == 0
    results, found = (json.loads((tmp_path / name).read_text()) for name in ("results.json", "eval.json"))
    assert found["base"]["loss"] == pytest.approx(results["before"]["loss"], rel=1e-6)
    assert found["adapter"]["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert run.main([*command, "--mode=merge"]) == 0
    assert not any(map(is_leaf, tree.flatten(load_pretrained(tmp_path / "merged")[1]).values()))
    capsys.readouterr()
    assert run.main([*command, "--mode=merge", "--requantize", f"--output={tmp_path / 'small'}"]) == 0
    said = capsys.readouterr().out
    assert "layers/mlp/up_proj/kernel" in said and "quantised" in said
    assert any(map(is_leaf, tree.flatten(load_pretrained(tmp_path / "small")[1]).values()))
    assert run.main([*arguments("lora"), f"--workdir={tmp_path / 'x'}", "--requantize"]) == 2
    assert "--requantize is for --mode=merge" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_began_as_loftq_s_stands_on_the_base_that_it_quantised(arguments, tmp_path):
    """Evaluated again it is the same, though nothing else in its configuration says that the base is quantised."""
    small = {"method.init_lora_weights": "loftq", "method.loftq_config": {"quant_type": "int4", "block_size": 16},
             "method.r": 2, "optim.steps": 2, "optim.epochs": 0}
    command = [*arguments("lora", **small), f"--workdir={tmp_path}"]
    assert run.main(command) == 0 and run.main([*command, "--mode=eval"]) == 0
    results, found = (json.loads((tmp_path / name).read_text()) for name in ("results.json", "eval.json"))
    assert found["adapter"]["loss"] == pytest.approx(results["after"]["loss"], rel=1e-5)
