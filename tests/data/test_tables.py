"""Rows of a table as examples: what counts as text, what a turn holds."""

import json

import pytest

from peft_jax.data import load_examples
from peft_jax.errors import PeftJaxError
from tests.data.test_sources import columns, task


def test_numbers_are_text_but_truth_values_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": 1, "answer": 2.5}\n')
    assert load_examples(columns(path))["train"] == [{"prompt": "1", "completion": "2.5", "origin": f"{path} row 1"}]
    path.write_text('{"question": "q", "answer": true}\n')
    with pytest.raises(PeftJaxError, match="column 'answer' must hold text, found bool"):
        load_examples(columns(path))


def test_turns_lose_the_keys_that_only_other_turns_have(tmp_path):
    """A table fills them with nothing; a chat template may tell a key that is there from one that is not."""
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "yo"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    assert load_examples(task(source=str(path), validation_fraction=0.0))["train"][0]["messages"] == turns


@pytest.mark.parametrize("content", ["question,answer\n", "question,answer", "", "\n"])
def test_a_csv_without_rows_says_so(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(PeftJaxError, match=r"a\.csv has no rows: put the columns' names on the first line"):
        load_examples(columns(path))
