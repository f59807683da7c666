"""Texts with labels: what is fed, what is asked at which token, packed or not."""

from types import SimpleNamespace

import numpy as np
import pytest

from peft_jax.core.rows import real_tokens
from peft_jax.data import Batches, eval_batches
from peft_jax.data.labelled import Labelled, encode_labelled, targets
from peft_jax.data.tables import keys_of_labels
from peft_jax.errors import PeftJaxError
from tests.data.test_sources import task

TEXTS = ["good", "a bad film", "the film is good, bad, great, okay or terrible", "okay"]


def settings(**changes):
    return SimpleNamespace(**{"max_length": 0, "on_too_long": "error", "collate": "pack", "batch_size": 4, "rows": 2,
                              "row_length": 0, "width_multiple": 8, "buckets": 2, **changes})


def encoded(tokenizer, labels=(3, 1, 0, 2), **changes):
    examples = [{"text": text, "label": label} for text, label in zip(TEXTS, labels)]
    return encode_labelled(examples, tokenizer, settings(**changes))


def test_texts_are_fed_as_the_tokenizer_makes_them(spaced_tokenizer):
    """With its special tokens: this one writes <s> in front."""
    found, counts = encoded(spaced_tokenizer)
    for one, text in zip(found, TEXTS):
        assert one.input_ids.tolist() == spaced_tokenizer(text)["input_ids"] and one.input_ids.dtype == np.int32
    assert [one.label for one in found] == [3, 1, 0, 2] and [one.example for one in found] == [0, 1, 2, 3]
    assert counts["sequences"] == counts["answer_tokens"] == 4
    assert counts["tokens"] == sum(len(one.input_ids) for one in found)


@pytest.mark.parametrize("collate", ["pack", "bucket", "pad"])
@pytest.mark.parametrize("labels, kind", [((3, 1, 0, 2), np.int32), ((0.5, -1.0, 2.0, 0.0), np.float32)])
def test_the_label_is_asked_at_the_first_token_of_each_text(tokenizer, collate, labels, kind):
    found, _ = encoded(tokenizer, labels)
    batch = Batches(found, settings(collate=collate)).at(0)
    rows, slots = np.nonzero(batch["loss_weight"])
    assert len(rows) == 4 and batch["loss_target"].dtype == kind
    asked = {}
    for row, slot in zip(rows, slots):
        first = batch["loss_index"][row, slot]
        segments = batch.get("segment_ids", real_tokens(batch))
        inside = segments[row] == segments[row, first]
        assert batch["positions"][row, first] == 0
        asked[tuple(batch["input_ids"][row][inside])] = batch["loss_target"][row, slot]
    assert asked == {tuple(one.input_ids): one.label for one in found}
    assert [tuple(b["loss_target"][:, 0]) for b in eval_batches(found, settings(batch_size=4))] == [labels]


def test_too_long_texts(tokenizer):
    longest = max(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    with pytest.raises(PeftJaxError, match=rf"example 2 has {longest} tokens, more than data.max_length={longest - 1}"):
        encoded(tokenizer, max_length=longest - 1)
    assert len(encoded(tokenizer, max_length=longest)[0]) == 4
    dropped, counts = encoded(tokenizer, max_length=longest - 1, on_too_long="drop")
    assert [one.example for one in dropped] == [0, 1, 3]
    assert (counts["examples"], counts["sequences"], counts["dropped"], counts["truncated"]) == (4, 3, 1, 0)
    side = tokenizer.truncation_side
    cut, counts = encoded(tokenizer, max_length=longest - 2, on_too_long="truncate_left")
    assert tokenizer.truncation_side == side == "right"
    assert cut[2].input_ids.tolist() == tokenizer(TEXTS[2])["input_ids"][2:] and counts["truncated"] == 1
    with pytest.raises(PeftJaxError, match="cannot be split"):
        encoded(tokenizer, on_too_long="split")
    with pytest.raises(PeftJaxError, match="none of 4 texts is left"):
        encoded(tokenizer, max_length=1, on_too_long="drop")


def test_a_text_that_is_cut_keeps_its_special_token_and_the_first_of_several_is_named(spaced_tokenizer):
    cut, counts = encoded(spaced_tokenizer, max_length=4, on_too_long="truncate_left")
    assert counts["truncated"] >= 2 and counts["longest"] == 4
    whole = spaced_tokenizer(TEXTS[2])["input_ids"]
    assert cut[2].input_ids.tolist() == [spaced_tokenizer.bos_token_id, *whole[-3:]]
    first = next(i for i, text in enumerate(TEXTS) if len(spaced_tokenizer(text)["input_ids"]) > 4)
    with pytest.raises(PeftJaxError, match=f"example {first} has"):
        encoded(spaced_tokenizer, max_length=4)


def test_targets_of_a_regression_are_numbers():
    index, target = targets(Labelled(np.array([5, 6], np.int32), 1.5))
    assert index.tolist() == [0] and target.dtype == np.float32 and target.tolist() == [1.5]


def test_labels_from_a_table(tmp_path):
    from peft_jax.data import load_examples

    (tmp_path / "a.csv").write_text("text,label\ngood,1\nbad,0\n")
    named = {"source": str(tmp_path / "a.csv"), "text_column": "text", "label_column": "label",
             "validation_fraction": 0.0}
    found = load_examples(task(answer="class", **named))["train"]
    assert [(e["text"], e["label"], type(e["label"])) for e in found] == [("good", 1, int), ("bad", 0, int)]
    assert [e["label"] for e in load_examples(task(answer="score", **named))["train"]] == [1.0, 0.0]
    (tmp_path / "a.csv").write_text("text,label\ngood,2\nbad,0\n")
    with pytest.raises(PeftJaxError, match=r"row 1: column 'label' holds '2', expected a whole number from 0 to 1"):
        load_examples(task(answer="class", **named))


def test_columns_called_text_and_label_need_no_naming_and_names_number_the_classes(tmp_path):
    from peft_jax.data import load_examples

    (tmp_path / "a.csv").write_text("id,text,label\n1,fun,good\n2,dull,bad\n3,so so,0\n")
    asked = {"source": str(tmp_path / "a.csv"), "validation_fraction": 0.0, "label_names": ("bad", "good")}
    found = load_examples(task(answer="class", **asked))["train"]
    assert [(one["text"], one["label"]) for one in found] == [("fun", 1), ("dull", 0), ("so so", 0)]
    with pytest.raises(PeftJaxError, match=r"row 1: column 'label' holds 'good', which is no class; did you mean god"):
        load_examples(task(answer="class", **{**asked, "label_names": ("god", "bad")}))
    (tmp_path / "a.csv").write_text("text,labell\nfun,good\n")
    with pytest.raises(PeftJaxError, match="has no column 'label'; name those to use"):
        load_examples(task(answer="class", **asked))


@pytest.mark.parametrize("labels, more, expected", [
    (["b", "a", "b"], {}, {"answer": "class", "label_names": ("a", "b"), "num_labels": 2}),
    (["10", "9", "x"], {}, {"answer": "class", "label_names": ("10", "9", "x"), "num_labels": 3}),
    (["-1", "1"], {}, {"answer": "class", "label_names": ("-1", "1"), "num_labels": 2}),
    (["0", "4", ""], {}, {"answer": "class", "num_labels": 5}),
    (["0", "1"], {"num_labels": 3}, {"answer": "class", "num_labels": 3}),
    (["0", "4"], {"text_column": "a", "label_column": "b"}, {"answer": "class", "num_labels": 2}),
    (["0.5", "1"], {}, {"answer": "score"}), (["0", "1"], {"answer": "score"}, {"answer": "score"}),
    (["nan", "1"], {}, {"answer": "class", "label_names": ("1", "nan"), "num_labels": 2}),
    (["0", "1"], {"label_names": ("no", "yes")}, {"answer": "class", "label_names": ("no", "yes"), "num_labels": 2}),
])
def test_what_labels_say_of_the_task(labels, more, expected):
    assert keys_of_labels(task(**more), labels) == expected


def test_rated_sentences_as_labels():
    from peft_jax.data.sources import rating_examples, text_key

    sentences = [(1.2, "A delight.", "a:1"), (-3.0, "Dull.", "a:2")]
    classes = rating_examples(task("movie_classes"), sentences)
    assert [(e["text"], e["label"], e["word"], e["score"]) for e in classes] == [
        ("A delight.", 3, "good", 1.2), ("Dull.", 0, "terrible", -3.0)]
    assert [e["label"] for e in rating_examples(task("movie_score"), sentences)] == [1.2, -3.0]
    words = rating_examples(task("movie_rating"), sentences)
    assert [text_key(e) for e in words] == [text_key(e) for e in classes]  # so both hold out the same sentences


def test_a_text_without_a_token_is_named(tokenizer, spaced_tokenizer):
    examples = [{"text": "good", "label": 0}, {"text": "", "label": 1, "origin": "a.csv row 2"}]
    with pytest.raises(PeftJaxError, match=r"example 1 \(a\.csv row 2\) is a text of which .* makes no token"):
        encode_labelled(examples, tokenizer, settings())
    assert len(encode_labelled(examples, spaced_tokenizer, settings())[0][1].input_ids) == 1  # its bos
