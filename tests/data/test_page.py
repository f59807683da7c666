"""The shapes that docs/data.md shows are those that are read."""

import re
from pathlib import Path

import pytest

from peft_jax.data import encode, load_examples
from peft_jax.data.tables import KNOWN, LABELLED, known_columns
from tests.data.test_sources import task

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```(jsonl|csv)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("kind, content", BLOCKS, ids=lambda value: value[:24])
def test_each_shape_of_the_page_is_read(kind, content, tmp_path, tokenizer):
    path = tmp_path / f"train.{kind}"
    path.write_text(content)
    labels = {"answer": "class", "label_names": ("negative", "positive")} if kind == "csv" else {}
    examples = load_examples(task(source=str(path), validation_fraction=0.0, **labels))["train"]
    assert len(examples) == 2
    if labels:
        assert [(one["text"], one["label"]) for one in examples] == [("a bright film", 1), ("a dull one", 0)]
    else:
        assert all(encode(one, tokenizer).loss_mask.any() for one in examples)


def test_every_known_shape_is_on_the_page(tmp_path):
    shown = {tuple(re.findall(r'"(\w+)": ["\[]', content.splitlines()[0])[: 3 if kind == "jsonl" else 0])
             for kind, content in BLOCKS}
    uses = [known_columns(names, "") for names in shown if names and "messages" not in names]
    words = {name for use in [*KNOWN, LABELLED] for name in use.values()}
    assert len(uses) == len(BLOCKS) - 2 and all(re.search(rf"\b{word}\b", PAGE) for word in words)
    assert {frozenset(use) for use in KNOWN} == {frozenset(use) for use in uses} | {frozenset({"messages"})}
