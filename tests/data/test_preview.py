"""What a person sees of an example is what is learnt of it."""

import numpy as np
import pytest

from peft_jax.data.labelled import Labelled
from peft_jax.data.preview import CLOSE, OPEN, parts_of, preview
from peft_jax.data.tokenize import encode

PROMPT = {"prompt": "Review: the film is", "completion": " good"}
CHAT = {"messages": [{"role": role, "content": text} for role, text in
                     (("user", "hello"), ("assistant", "good"), ("user", "world"), ("assistant", "bad"))]}


@pytest.mark.parametrize("example", [PROMPT, CHAT, {"text": "In one word, the movie is good"}])
def test_parts_are_the_decoded_text_and_the_learnt_ones_the_learnt_tokens(example, tokenizer, spaced_tokenizer):
    for one in (tokenizer, spaced_tokenizer):
        if "messages" in example and one is spaced_tokenizer:  # it has no chat template
            continue
        encoded = encode(example, one)
        parts = parts_of(encoded, one)
        assert "".join(text for text, _ in parts) == one.decode(encoded.input_ids)
        learnt = one.decode(encoded.input_ids[encoded.loss_mask])
        assert "".join(text for text, is_learnt in parts if is_learnt).strip() == learnt.strip()


def test_a_short_example_is_shown_whole(tokenizer):
    assert preview(encode(PROMPT, tokenizer), tokenizer, title="the first example").splitlines()[1] == (
        "  Review: the film is[[ good<|im_end|>]]")
    lines = preview(encode(CHAT, tokenizer), tokenizer).splitlines()
    assert lines[0].endswith("5 learnt: those between [[ and ]]") and "  [[bad<|im_end|>]]" in lines


def test_a_long_example_is_cut_in_the_middle_and_says_how_much(tokenizer):
    long = {"prompt": "Review: " + "the film\nis\t" * 400, "completion": " good" * 300}
    shown = preview(encode(long, tokenizer), tokenizer, brief=True).splitlines()
    assert len(shown) <= 7 and max(map(len, shown)) <= 80
    text = "".join(line[2:] for line in shown[1:])
    prompt = len(long["prompt"])
    assert f" ... ({prompt - 140:,} characters) ... " in text and text.count(OPEN) == text.count(CLOSE) == 1
    assert "film\\nis\\t" in text and text.endswith("good<|im_end|>]]")
    full = preview(encode(long, tokenizer), tokenizer).splitlines()
    assert len(full) > 400 and "characters" not in full[1] and max(map(len, full)) <= 80


def test_many_turns_are_cut_to_the_first_and_last(tokenizer):
    turns = {"messages": CHAT["messages"] * 5}
    shown = preview(encode(turns, tokenizer), tokenizer, brief=True)
    text = shown.partition("\n")[2]
    assert text.count(OPEN) == 2 and " characters) ... " in shown and len(shown.splitlines()) <= 7


def test_a_label_is_told_by_its_name(tokenizer):
    one = Labelled(np.asarray(tokenizer("the film")["input_ids"], np.int32), 1)
    assert preview(one, tokenizer, ("bad", "good")).splitlines()[0].endswith("whose label is learnt: good")
    assert preview(one, tokenizer).splitlines()[0].endswith("whose label is learnt: 1")
    assert preview(one, tokenizer).splitlines()[1] == "  the film"
