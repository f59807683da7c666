"""``--mode=generate --adapters=a,b``: several adapters side by side."""

import copy
import json
import re

import jax
import pytest

import run
from peft_jax import lora, save_adapter, save_pretrained
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


def test_a_system_prompt_wants_a_chat_template_and_a_question(tiny_folder, adapters, capsys):
    sources = [adapters / "one" / "adapter"]
    assert generate(tiny_folder, sources, "--system=Be terse.") == 2
    assert f"--system needs a chat template, and the tokenizer of {tiny_folder} has none" in capsys.readouterr().err
    assert generate(tiny_folder, sources, "--system=Be terse.", "--mode=eval", "--adapters=") == 2
    assert "--system is for --mode=generate" in capsys.readouterr().err
    assert run.main([f"--config=experiments/lora.py:model={tiny_folder}", "--mode=generate", "--system=Be terse."]) == 2
    assert "--system goes before the questions of --prompt" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chatty(tiny_model, tiny_tokenizer, tmp_path_factory):
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    save_pretrained(folder, *tiny_model, tokenizer)
    return folder


@pytest.mark.slow
def test_a_system_prompt_is_in_the_template(chatty, adapters, capsys):
    assert generate(chatty, [adapters / "one" / "adapter"], "--system=Be terse.") == 0
    assert capsys.readouterr().out.startswith("<system>Be terse.<end><user>the film is<end><assistant>\n  base:")


@pytest.mark.slow
def test_instructions_are_learnt_as_turns_where_that_is_asked_for(chatty, tmp_path, capsys):
    """And where it is not, a line says so."""
    rows = [{"instruction": f"Name film {number}.", "output": "A good film."} for number in range(12)]
    (tmp_path / "alpaca.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 1, "eval.before": False, "eval.probe": "",
                "task.validation_fraction": 0.5, "eval.batch_size": 4, "method.r": 2}  # fmt: skip
    command = [f"--config=experiments/lora.py:model={chatty},task={tmp_path / 'alpaca.jsonl'}",
               *(f"--config.{key}={value}" for key, value in settings.items())]
    assert run.main([*command, f"--workdir={tmp_path / 'plain'}"]) == 0
    plain = capsys.readouterr().out
    assert run.main([*command, f"--workdir={tmp_path / 'chat'}", "--config.task.chat=True"]) == 0
    chats = capsys.readouterr().out
    assert "the model's chat template is not used" in plain and "chat template" not in chats
    tokens = [int(re.search(r"examples, (\d+) tokens", out)[1]) for out in (plain, chats)]
    assert tokens[1] > tokens[0]
    assert run.main([*command, f"--workdir={tmp_path / 'chat'}", "--config.task.chat=True", "--mode=generate",
                     "--prompt=Name film 1."]) == 0
    assert capsys.readouterr().out.startswith("<user>Name film 1.<end><assistant>")


@pytest.mark.slow
def test_a_run_says_where_text_ends_and_learns_that(tiny_model, tiny_tokenizer, tmp_path, capsys):
    """A template whose turns end with another token than eos: of a full run the saved model stops at both, too."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["~"])  # one of its own
    tokenizer.chat_template = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}~{% endfor %}"
                               "{% if add_generation_prompt %}<assistant>{% endif %}")
    save_pretrained(tmp_path / "model", *tiny_model, tokenizer)
    rows = [{"messages": [{"role": "user", "content": f"Name film {number}."},
                          {"role": "assistant", "content": "A bad film.", "weight": 0},
                          {"role": "user", "content": "Another."},
                          {"role": "assistant", "content": "A good film."}]} for number in range(12)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"mesh.data": 1, "data.batch_size": 4, "optim.steps": 1, "eval.before": False, "eval.probe": "",
                "task.validation_fraction": 0.5, "eval.batch_size": 4}  # fmt: skip
    command = [f"--config=experiments/full.py:model={tmp_path / 'model'},task={tmp_path / 'chats.jsonl'}",
               *(f"--config.{key}={value}" for key, value in settings.items()), f"--workdir={tmp_path / 'run'}"]
    assert run.main(command) == 0
    said, line = capsys.readouterr().out, "a text ends at ~, as the chat template's turns do, and at <end>\n"
    assert line in said and "answers left out by their weight or train" in said
    assert "[[A good film.~]]" in said.replace("\n  ", "")  # where a line is broken
    assert run.main([*command, "--mode=generate", "--prompt=Name film 1."]) == 0
    assert capsys.readouterr().out.startswith(f"{line}<user>Name film 1.~<assistant>")
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, tokenizer.convert_tokens_to_ids("~")]


@pytest.mark.slow
def test_a_quantised_base_writes_the_same_plain_or_packed_and_says_which(tiny_folder, adapters, capsys):
    command = [f"--config=experiments/qlora.py:model={tiny_folder}", "--mode=generate", "--prompt=the film is",
               f"--adapters={adapters / 'one' / 'adapter'}", "--config.generate.max_new_tokens=4",
               "--config.method.quantize.block_size=16", "--config.model.dtype=float32"]  # fmt: skip
    assert run.main(command) == 0
    plain = capsys.readouterr().out.splitlines()
    assert run.main([*command, "--config.generate.dequantize=never"]) == 0
    packed = capsys.readouterr().out.splitlines()
    assert plain[0].startswith("text is written with plain weights, decoded once: plain it takes 0.0 GB, ")
    assert packed[0] == "text is written with packed weights: dequantize=never"
    assert plain[1:] == packed[1:] and len(plain) > 3
    assert run.main([*command, "--config.generate.dequantize=packed"]) == 2
    assert "--config.generate.dequantize=packed: choose one of: always, auto, never" in capsys.readouterr().err
