"""Rows of a table as examples: what counts as text, what a turn holds."""

import json

import pytest

from peft_jax.data import load_examples
from peft_jax.data.tables import MOST_LABELS, keys_of_labels
from peft_jax.data.turns import chat_of
from peft_jax.errors import PeftJaxError
from tests.data.test_sources import columns, task


def test_numbers_are_text_but_truth_values_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": 1, "answer": 2.5}\n')
    assert load_examples(columns(path))["train"] == [{"prompt": "1", "completion": "2.5", "origin": f"{path} row 1"}]
    path.write_text('{"question": "q", "answer": true}\n')
    with pytest.raises(PeftJaxError, match="column 'answer' must hold text, found bool"):
        load_examples(columns(path))


@pytest.mark.parametrize("answers, texts", [
    ("4 0.5 10000000 12345678901234567890", "4 0.5 10000000 12345678901234567890"), ('"007" "010" 5', "007 010 5"),
    ('"2024-01-02" "2024-01-03"', "2024-01-02 2024-01-03"), ('"2024-01-02" "n/a"', "2024-01-02 n/a")])
def test_answers_are_learnt_as_the_file_writes_them(tmp_path, answers, texts):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"question": "q", "answer": {one}}}\n' for one in answers.split(" ")))
    assert [one["completion"] for one in load_examples(columns(path))["train"]] == texts.split(" ")
    path.write_text("".join('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": '
                            f"{one}}}]}}\n" for one in answers.split(" ")))
    chats = load_examples(task(source=str(path), validation_fraction=0.0))["train"]
    assert [one["messages"][1]["content"] for one in chats] == texts.split(" ")


def test_turns_lose_the_keys_that_only_other_turns_have(tmp_path):
    """A table fills them with nothing; a chat template may tell a key that is there from one that is not."""
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "yo"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert load_examples(task(source=str(path), validation_fraction=0.0))["train"][0]["messages"] == turns


def test_a_table_fills_in_nothing_that_a_template_would_write(tmp_path):
    """Arrow gives each dict of a column the keys of all."""
    datasets = pytest.importorskip("datasets")
    tools = [[{"name": "look", "of": {"type": "string"}}], [{"name": "add", "to": {"type": "number"}}]]
    datasets.Dataset.from_dict({"messages": [TURNS] * 2, "tools": tools}).to_parquet(tmp_path / "a.parquet")
    rows = load_examples(task(source=str(tmp_path / "a.parquet"), validation_fraction=0.0))["train"]
    assert [row["tools"] for row in rows] == tools


@pytest.mark.parametrize("content", ["question,answer\n", "question,answer", "", "\n"])
def test_a_csv_without_rows_says_so(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(PeftJaxError, match=r"a\.csv has no rows: put the columns' names on the first line"):
        load_examples(columns(path))


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SYSTEM = {"role": "system", "content": "Be terse."}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def loaded(tmp_path, *rows, **changes):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = load_examples(task(source=str(path), validation_fraction=0.0, **changes))["train"]
    assert [one.pop("origin") for one in examples] == [f"{path} row {number}" for number in range(1, len(rows) + 1)]
    return examples


SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


@pytest.mark.parametrize("row, example", [
    ({"conversations": SHAREGPT}, {"messages": TURNS}),
    ({"conversations": SHAREGPT, "system": "Be terse."}, {"messages": [SYSTEM, *TURNS]}),
    ({"conversations": [{"from": "system", "value": "Be terse."}, *SHAREGPT], "system": ""},
     {"messages": [SYSTEM, *TURNS]}),
    ({"messages": TURNS, "tools": TOOLS}, {"messages": TURNS, "tools": TOOLS}),
    ({"messages": TURNS, "tools": json.dumps(TOOLS)}, {"messages": TURNS, "tools": TOOLS}),
    ({"messages": TURNS, "tools": None}, {"messages": TURNS}),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                   TURNS[1]]}, {"messages": TURNS}),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"messages": TURNS}),
    ({"prompt": TURNS[:1], "completion": "yo", "tools": TOOLS}, {"messages": TURNS, "tools": TOOLS}),
    ({"prompt": [*TURNS, TURNS[0]], "completion": TURNS[1:]},
     {"messages": [TURNS[0], {**TURNS[1], "train": False}, *TURNS]}),
])
def test_shapes_of_chats_become_messages(tmp_path, row, example):
    assert loaded(tmp_path, row) == [example]


def test_calls_of_tools_are_read_from_each_shape(tmp_path):
    arguments = {"of": "Lima", "n": 1}
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": json.dumps(arguments)}}
    bare = {"name": "look", "arguments": arguments}
    rows = [{"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]},
            {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [bare]}]},
            {"messages": [TURNS[0], {"role": "assistant", "content": None, "function_call": bare}]},
            {"messages": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps(bare)},
                          {"from": "observation", "value": "42"}]}]
    first, second, third, fourth = (example["messages"] for example in loaded(tmp_path, *rows))
    assert first[1] == {"role": "assistant", "content": "", "tool_calls": [{**call, "function": bare}]}
    assert second[1]["tool_calls"] == [bare] and third[1]["tool_calls"] == [{"type": "function", "function": bare}]
    assert fourth[1] == third[1] and fourth[2] == {"role": "tool", "content": "42"}


def test_names_of_roles_and_keys_are_settings(tmp_path):
    row = {"turns": [{"speaker": "visitor", "says": "hi"}, {"speaker": "critic", "says": "yo"}]}
    names = {"messages_column": "turns", "role_key": "speaker", "content_key": "says",
             "roles": ("visitor=user", "critic=assistant")}  # fmt: skip
    assert loaded(tmp_path, row, **names) == [{"messages": TURNS}]
    with pytest.raises(PeftJaxError, match=r"task\.roles has 'critic': write NAME=ROLE"):
        loaded(tmp_path, row, **{**names, "roles": ("critic",)})
    with pytest.raises(PeftJaxError, match=r"turn 0 has the keys speaker, says \(task\.role_key and"):
        loaded(tmp_path, row, messages_column="turns")


ALPACA = {"instruction": "Name one.", "input": "", "output": "Lima", "system": "Be terse.", "history": [["hi", "yo"]]}


def test_system_and_history_beside_an_instruction_are_turns_of_its_chat(tmp_path):
    from peft_jax.data.chat import as_turns

    (plain,) = loaded(tmp_path, {**ALPACA, "system": "", "history": []})
    assert plain == {"prompt": "Name one.\n", "completion": "Lima"}
    (chat,) = as_turns(loaded(tmp_path, ALPACA, chat=True))
    asked = [{"role": "user", "content": "Name one."}, {"role": "assistant", "content": "Lima"}]
    assert chat == {"messages": [SYSTEM, *TURNS, *asked]}
    with pytest.raises(PeftJaxError, match=r"row 1: only a chat has a place for what its column 'system' holds: set"):
        loaded(tmp_path, ALPACA)
    named = loaded(tmp_path, ALPACA, prompt_column="instruction", completion_column="output")
    assert named == [{"prompt": "Name one.", "completion": "Lima"}]
    with pytest.raises(PeftJaxError, match="history must be a list of pairs"):
        as_turns(loaded(tmp_path, {**ALPACA, "history": ["hi"]}, chat=True))


@pytest.mark.parametrize("row, words", [
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]},
     "row 1, turn 0: its content holds a part of type 'image_url', and only text can be learnt"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "'input_audio'"),
    ({"messages": [*TURNS[:1], {"role": "assistant", "content": None}]}, "turn 1 has no content"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "turn 0: its content must be text, found dict"),
    ({"messages": [*TURNS, {"role": "assistant", "tool_calls": [{"type": "function"}]}]},
     "each of its tool_calls must"),
    ({"messages": [SYSTEM, *TURNS], "system": "Be kind."}, "has a system text and a system turn, too"),
    ({"messages": TURNS, "tools": "look"}, "tools must be a list"),
    ({"conversations": [{"from": "function_call", "value": "look!"}]}, "its function call must be"),
    ({"messages": "hi"}, "messages must be a list"),
])
def test_what_a_chat_cannot_hold_is_refused_by_name(tmp_path, row, words):
    with pytest.raises(PeftJaxError, match=words):
        loaded(tmp_path, row)


def test_messages_in_prompts_go_with_no_template_of_text(tmp_path):
    with pytest.raises(PeftJaxError, match=r"row 1 holds messages, which task\.prompt_template and"):
        loaded(tmp_path, {"prompt": TURNS[:1], "completion": TURNS[1:]}, prompt_template="Q: {prompt}")


def test_a_number_that_no_class_has_is_no_class():
    """One head of a hundred million classes would fill the memory."""
    labelled = task(answer="class")
    assert keys_of_labels(labelled, ["0", str(MOST_LABELS - 1)])["num_labels"] == MOST_LABELS
    for label in (str(MOST_LABELS), "1" + "0" * 300):
        with pytest.raises(PeftJaxError, match=r"labels are whole numbers up to .*: set --config.task.label_names"):
            keys_of_labels(labelled, ["0", label])


def test_tools_of_brackets_in_brackets_are_named():
    with pytest.raises(PeftJaxError, match="row 3: tools must be a list"):
        chat_of({"messages": [{"role": "user", "content": "Hello"}], "tools": "[" * 100_000}, "row 3")
