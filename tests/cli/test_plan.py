"""A plan is of the program that training runs, and needs no weights."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

import run
from peft_jax import lora, plan
from peft_jax.cli import modes, workdir
from peft_jax.cli import train as training
from peft_jax.cli.build_method import build_method
from peft_jax.cli.build_optimizer import build_optimizer
from peft_jax.cli.plan import batch_sizes, plan_config
from peft_jax.cli.session import load_session
from peft_jax.errors import PeftJaxError
from peft_jax.models import GPT2, GPT2Config
from peft_jax.planner.compiled import memory_of
from peft_jax.train.loop import at_step
from tests.test_run import data  # noqa: F401, the fixture of a small run

pytestmark = pytest.mark.usefixtures("at_the_root")


@pytest.fixture
def asked(tiny_folder, data, tmp_path):  # noqa: F811
    """``asked(experiment, *options)``: the command of a plan for the tiny model."""
    def parsed(experiment, *options, model=tiny_folder):
        fixed = ["--config.task.prompt_column=prompt", "--config.task.completion_column=completion",
                 "--config.task.validation_fraction=0.2", "--config.eval.probe=", "--config.mesh.data=1", "--mode=plan"]
        return run.parse_command([f"--config=experiments/{experiment}.py:model={model},task={data}", *fixed,
                                  f"--workdir={tmp_path / 'run'}", *options])
    return parsed


@pytest.mark.slow
@pytest.mark.parametrize("experiment, options", [
    ("qlora", ["--config.method.quantize.block_size=16"]),
    ("adapter", ["--config.optim.accumulate_steps=2", "--config.model.remat=True"])])
def test_it_is_the_memory_of_the_program_that_training_runs(asked, experiment, options):
    config = asked(experiment, *options).config
    session, method = load_session(config), build_method(config)
    batches, total = training._batches(session, method)
    params = method.init(jax.random.key(0), session.base)
    step, state, frozen = training._start(session, method, session.bound(method), params, total)
    batch = at_step(batches, 0)
    real = memory_of(step.lower(state, frozen, batch).compile())

    _, rows, length = batch["input_ids"].shape
    found = plan(method, session.model, build_optimizer(config.optim, total, method.labels(params)),
                 rows, length, answers=batch["loss_index"].shape[-1],
                 accumulate_steps=config.optim.accumulate_steps, packed="segment_ids" in batch)
    assert found.program.memory == real


@pytest.mark.slow
def test_a_config_without_weights_is_enough(asked, tiny_folder, tmp_path, capsys):
    model = tmp_path / "sizes"
    model.mkdir()
    (model / "config.json").write_text((tiny_folder / "config.json").read_text())
    command = asked("qlora", model=model)
    assert modes.run(command) == 0
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "run" / "plan.json").read_text())
    assert "quantised weights" in shown and "RTX 4090       24 GB      1" in shown and "assumed" in shown
    compiled = written["compiled"]
    assert compiled["total"] == sum(compiled[key] for key in ("arguments", "outputs", "temporaries")) - compiled[
        "aliases"]
    assert written["sum_of_parts"] == sum(part["bytes"] for part in written["parts"] if part["counted"])
    assert {device["count"] for device in written["devices"]} == {1} and compiled["estimate"]
    full, qlora = written["rules_of_thumb"]
    assert full["bytes"] == 14 * int(full["recipe"].split()[5].replace(",", "")) and qlora["name"] == "QLoRA"
    assert f"{100 * full['error']:+.0f} % against the compiled step" in shown and "QLoRA" in shown
    assert written["assumed"]["method"] == "QUANTIZE + LORA" and "(GB of 1e9 bytes)" in shown


@pytest.mark.slow
def test_where_it_cannot_be_written_is_said(asked, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    workdir.claim(tmp_path / "run", "plan.json")
    (tmp_path / "run" / "plan.json").mkdir()
    command = asked("lora", "--config.data.row_length=16")
    with pytest.raises(PeftJaxError, match="run cannot be written: Is a directory"):
        modes.run(command)


@pytest.mark.slow
def test_packed_rows_may_be_longer_than_the_positions_as_in_training(asked):
    longer = plan_config(asked("lora", "--config.data.row_length=272").config)
    assert longer.assumed["micro-batch"].startswith("1 x 272 tokens")
    model = GPT2(GPT2Config(99, 32, 48, 2, 4, 8))
    params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
    ids, at, which = np.ones((1, 12), np.int32), np.arange(12)[None] % 6, np.arange(12)[None] // 6 + 1
    logits = model.apply({"params": params}, ids, positions=at, segment_ids=which)
    assert np.allclose(logits[:, :6], logits[:, 6:], atol=1e-5)


def test_a_mesh_that_is_not_there_says_how_it_can_be(asked):
    with pytest.raises(PeftJaxError, match=r"does not fit.*xla_force_host_platform_device_count"):
        plan_config(asked("lora", "--config.mesh.fsdp=16").config)


def test_cudnn_where_there_is_none_is_said(asked):
    with pytest.raises(PeftJaxError, match="cudnn' wants an NVIDIA GPU"):
        plan_config(asked("lora", "--config.model.attn_implementation=cudnn").config)


@pytest.mark.slow
def test_a_base_quantised_from_float32_is_computed_with_in_bfloat16(asked):
    found = plan_config(asked("qlora", "--config.model.param_dtype=float32", "--config.data.row_length=32").config)
    assert found.assumed["computing in"] == "bfloat16"


@pytest.mark.slow
def test_weights_that_the_checkpoint_holds_quantised_are_planned_so(asked, tiny_folder, tmp_path):
    given = json.loads((tiny_folder / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                "llm_int8_skip_modules": ["down_proj", "lm_head"]}
    model = tmp_path / "sizes"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**given, "quantization_config": settings}))
    found = plan_config(asked("lora", "--config.data.row_length=32", model=model).config)
    layer = 32 * (2 * 32 + 2 * 16 + 2 * 48)  # q, o; k, v; gate, up
    assert found.parts[0].name == "quantised weights" and found.parts[0].recipe.startswith(f"{2 * layer:,} in nf4")
    assert "quantised as its config.json says" in found.assumed["model"]


@pytest.mark.parametrize("options, shape, words", [
    ([], (1, 256), "set --config.data.rows and --config.data.row_length"),
    (["--config.data.rows=3"], (3, 256), "set --config.data.row_length"),
    (["--config.data.rows=3", "--config.data.row_length=64"], (3, 64), "as set"),
    (["--config.data.collate=pad"], (16, 256), "batch_size")])
def test_what_is_assumed_of_the_batch_is_said(asked, tiny_model, options, shape, words):
    config = asked("lora", "--config.data.max_length=256", *options).config
    *sizes, said = batch_sizes(config.data, tiny_model[0].config, 1)
    assert tuple(sizes) == shape and words in said


@pytest.mark.parametrize("change, words", [
    ({"batch": 0}, "batch=0: give a whole number"), ({"seq": 257}, "seq=257, but the model has 256"),
    ({"loss_chunk": 1.5}, "loss_chunk=1.5"), ({"answers": -1}, "answers=-1")])
def test_sizes_that_cannot_be_meant(tiny_model, change, words):
    with pytest.raises(PeftJaxError, match=words):
        plan(lora(), tiny_model[0], optax.adamw(1e-4), **change)


def test_a_method_that_needs_data_cannot_be_planned(tiny_model):
    with pytest.raises(PeftJaxError, match="depend on data"):
        plan(lora(init_lora_weights="eva"), tiny_model[0], optax.adamw(1e-4), seq=32)


@pytest.mark.slow
def test_a_plan_grows_with_rows_and_layers(tiny_model):
    model = tiny_model[0]
    deeper = model.clone(config=dataclasses.replace(model.config, num_hidden_layers=4))
    small, wide, deep = (plan(lora(), one, optax.adamw(1e-4), rows, 32).program.memory
                         for one, rows in ((model, 1), (model, 4), (deeper, 1)))
    assert wide.temporaries > small.temporaries and deep.arguments > small.arguments


@pytest.mark.real
@pytest.mark.parametrize("model, weights, arguments", [("llama3_8b", 8_030_261_248, 6.206), ("llama3_70b",
                                                       70_553_706_496, 42.002)])
def test_qlora_of_8_and_70_billion_parameters_fits_80_gb(model, weights, arguments):
    command = run.parse_command([f"--config=experiments/qlora.py:model={model}", "--config.mesh.data=1", "--mode=plan"])
    found = plan_config(command.config)
    scalings = 7 * (32 if model == "llama3_8b" else 80)
    count = [int(part.recipe.split()[0].replace(",", "")) for part in found.parts[:2]]
    assert sum(count) - scalings == weights
    assert "4.127 bits" in found.parts[0].recipe
    memory = found.program.memory
    assert memory.arguments / 1e9 == pytest.approx(arguments, abs=1e-3)
    assert memory.total + 2 * 10**9 < 80 * 10**9
    assert not [path for path in found.program.copies if path.startswith("layers/") and path.endswith("kernel")]
    assert np.isclose(found.sum, memory.total, rtol=0.3)  # a CPU's float32 copies, of the head above all
