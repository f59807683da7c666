"""``--mode=generate --adapters=a,b``: several adapters side by side."""

import jax
import pytest

import run
from peft_jax import lora, save_adapter
from tests import properties


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """Two trained runs' adapter folders, of different ranks."""
    model, base = tiny_model
    folder = tmp_path_factory.mktemp("runs")
    for name, r in (("one", 2), ("two", 3)):
        method = lora(r=r)
        save_adapter(folder / name / "adapter", method,
                     model, properties.moved(method, method.init(jax.random.key(r), base), seed=r, by=1.0))
    return folder


def generate(tiny_folder, sources, *more):
    return run.main([f"--config=experiments/lora.py:model={tiny_folder}", "--mode=generate", "--prompt=the film is",
                     f"--adapters={','.join(map(str, sources))}", "--config.generate.max_new_tokens=4", *more])


@pytest.mark.slow
def test_each_adapter_answers_under_the_name_of_its_run(tiny_folder, adapters, capsys):
    assert generate(tiny_folder, [adapters / "one" / "adapter", adapters / "two" / "adapter"]) == 0
    prompt, *answers = capsys.readouterr().out.strip().splitlines()
    assert prompt == "the film is"
    assert [line.split(":")[0].strip() for line in answers] == ["base", "one", "two"]
    assert len({line.split(":", 1)[1] for line in answers}) == 3


@pytest.mark.slow
def test_equal_names_are_written_out(tiny_folder, adapters, capsys):
    one = adapters / "one" / "adapter"
    assert generate(tiny_folder, [one, f"{one}/"]) == 0
    assert f"  {one}:" in capsys.readouterr().out


def test_a_folder_without_an_adapter_is_named(tiny_folder, adapters, capsys):
    assert generate(tiny_folder, [adapters / "one"]) == 2
    assert f"{adapters / 'one'} has no adapter_config.json" in capsys.readouterr().err


def test_adapters_belong_to_generate(tiny_folder, adapters, capsys):
    assert generate(tiny_folder, [adapters / "one" / "adapter"], "--mode=eval") == 2
    assert "--adapters is for --mode=generate" in capsys.readouterr().err


def test_empty_entries_of_a_list_of_adapters_are_none():
    argv = ["--config=experiments/lora.py", "--mode=generate", "--adapters=runs/a/adapter,"]
    assert run.parse_command(argv).adapters == ["runs/a/adapter"]
