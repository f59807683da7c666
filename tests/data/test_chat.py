"""Questions and answers as turns of a chat."""

from types import SimpleNamespace

import pytest

from peft_jax.data import chat, encode, encode_prompts
from peft_jax.errors import PeftJaxError

ALPACA = {"prompt": "Name a good film.\n", "completion": "The great film.", "origin": "a.jsonl row 1"}


def task(**changes):
    columns = {f"{name}_column": "" for name in ("prompt", "completion", "messages", "text", "label")}
    return SimpleNamespace(**{"chat": False, "prompt_template": "{prompt}", "completion_template": "{completion}",
                              **columns, **changes})


def test_prompt_and_completion_become_two_turns_of_the_template(tokenizer):
    (example,) = chat.as_turns([ALPACA])
    assert example["origin"] == ALPACA["origin"]
    one = encode(example, tokenizer)
    whole = "<|im_start|>user\nName a good film.<|im_end|>\n<|im_start|>assistant\nThe great film.<|im_end|>"
    assert tokenizer.decode(one.input_ids) == whole
    assert tokenizer.decode(one.input_ids[one.loss_mask]) == "The great film.<|im_end|>"
    (asked,) = encode_prompts([chat.question("Name a good film.")], tokenizer)
    assert list(asked) == list(one.input_ids[:len(asked)]) and not one.loss_mask[:len(asked)].any()


def test_a_chat_stays_and_plain_text_is_an_error():
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert chat.as_turns([talk]) == [talk]
    with pytest.raises(PeftJaxError, match=r"b\.csv row 2 has no prompt and completion"):
        chat.as_turns([{"text": "a", "origin": "b.csv row 2"}])


def test_a_system_prompt_goes_before_the_question(tokenizer):
    (ids,) = encode_prompts([chat.question("Who?", "Be terse.")], tokenizer)
    start = "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == start


def test_a_template_that_is_not_used_is_said_once_it_could_be_meant(tokenizer, spaced_tokenizer):
    assert "--config.task.chat=True" in chat.unused_template(task(), [ALPACA], tokenizer)
    (turns,) = chat.as_turns([ALPACA])
    written = tokenizer.apply_chat_template(turns["messages"][:1], tokenize=False, add_generation_prompt=True)
    for silent in ((task(), [ALPACA], spaced_tokenizer),  # has no template
                   (task(chat=True), [turns], tokenizer), (task(), [turns], tokenizer),
                   (task(), [{"text": "a"}], tokenizer),
                   (task(), [{**ALPACA, "prompt": written}], tokenizer),
                   (task(prompt_column="a", completion_column="b"), [ALPACA], tokenizer),
                   (task(prompt_template="Q: {prompt}\nA:"), [ALPACA], tokenizer),
                   (SimpleNamespace(kind="rating"), [ALPACA], tokenizer)):  # fmt: skip
        assert chat.unused_template(*silent) == ""
