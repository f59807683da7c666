"""A chat as rows to learn: each answer as the model would write it, after the very text that it is asked with.

An answer is learnt behind its own prompt: the turns before it, rendered with the template's generation prompt. Where
the template only ever appends, the answers of a chat share a row. Where it rewrites history (it may cut the reasoning
out of earlier answers), or writes no token behind an answer, each answer that the next prompt does not repeat begins a
row of its own.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from peft_jax.data.turns import Example, Turn, chat_of, is_learnt, shown, with_json_arguments
from peft_jax.errors import PeftJaxError, some
from peft_jax.hub.chat_template import REASONING, alike, end_of_turn, first_mark, marks, render

CHAT_LOSS = ("all", "last")
MARK = "answerofthemodel"  # stands for an answer; no template writes it
TAG = re.compile(r"\s*<([^<>|/\s]+)>\s*")

Piece = tuple[str, bool]  # text, has loss


class Row(NamedTuple):
    """A text in pieces. ended: whether a token ends it, so that no eos is to be put there."""

    pieces: list[Piece]
    ended: bool = False

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


class Rows(NamedTuple):
    """The rows of a chat. unweighted: answers that say themselves that they are not to be learnt. closed: answers
    without reasoning, after a prompt that opens some."""

    rows: list[Row]
    unweighted: int
    closed: int


class Template(NamedTuple):
    """A tokenizer whose chat template is used. marks: match tokens that no text spells. end: the one that ends an
    answer, or "". add_end: whether to put it where the template writes none behind a last answer."""

    tokenizer: Any
    marks: tuple[re.Pattern[str], re.Pattern[str]]
    end: str
    add_end: bool


class Answer(NamedTuple):
    """prompt, text: what it is asked with, and what is to be learnt. ended, closed: as of :class:`Row`, :class:`Rows`,
    of this one."""

    prompt: str
    text: str
    ended: bool
    closed: bool


class Written(NamedTuple):
    """What a template writes of a turn. before: the turns before it. prompt: these with the generation prompt. chat:
    these and the turn. head, tail: what stands before and behind an answer in the turn's place."""

    before: str
    prompt: str
    chat: str
    head: str
    tail: str


def template_of(tokenizer: Any, add_end: bool) -> Template:
    """How the chats of ``tokenizer`` are written."""
    return Template(tokenizer, marks(tokenizer), end_of_turn(tokenizer), add_end)


def prompt_of(example: Example, tokenizer: Any, where: str) -> str:
    """The turns before the last answer, or all where the last turn is no answer, with the generation prompt."""
    example = chat_of(example, where)
    turns, tools = shown(example["messages"]), example.get("tools")
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    _check_tools(tokenizer, asked, tools, where)
    return _rendered(tokenizer, asked, True, where, tools)


def _rendered(tokenizer: Any, turns: Sequence[Turn], generation_prompt: bool, where: str, tools: Any = None) -> str:
    """As :func:`render`; with the arguments of calls as JSON where the template takes no dict."""
    try:
        return render(tokenizer, turns, generation_prompt, where, tools)
    except PeftJaxError:
        if (others := with_json_arguments(turns)) == list(turns):
            raise
        return render(tokenizer, others, generation_prompt, where, tools)


def chat_rows(example: Example, template: Template, chat_loss: str, where: str) -> Rows:
    """The rows of an example with ``"messages"``.

    Args:
      chat_loss: "all" answers of the assistant, or the "last".
    Raises:
      PeftJaxError: names ``where``: no answer, an empty one, or one of which the template leaves something out.
    """
    example = chat_of(example, where)
    turns, tools = example["messages"], example.get("tools")
    learnt = [is_learnt(turn, f"{where}, turn {i}") for i, turn in enumerate(turns)]
    asked = _answers_of(turns, where)[0 if chat_loss == "all" else -1:]
    turns = shown(turns)
    _check_tools(template.tokenizer, turns[:asked[0]], tools, where)
    answers = [_answer(turns[:i + 1], template, tools, where) for i in asked if learnt[i]]
    return Rows(_rows(answers, template.add_end), len(asked) - len(answers), sum(one.closed for one in answers))


def _answers_of(turns: Sequence[Turn], where: str) -> list[int]:
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        roles = some(list(dict.fromkeys(turn["role"] for turn in turns)))
        raise PeftJaxError(f"{where} has no assistant turn to learn from; its roles are {roles} (task.roles renames "
                           "them)")
    return answers


def _rows(answers: Sequence[Answer], add_end: bool) -> list[Row]:
    rows: list[Row] = []
    for answer in answers:
        before = rows[-1] if rows else Row([])
        if rows and (before.ended or not add_end) and answer.prompt.startswith(before.text):
            rows.pop()
        else:
            before = Row([])
        asked = (answer.prompt[len(before.text):], False)
        rows.append(Row([*before.pieces, asked, (answer.text, True)], answer.ended))
    return rows


def _answer(turns: Sequence[Turn], template: Template, tools: Any, where: str) -> Answer:
    """The last turn behind its prompt: as the template writes it at the end of a chat, where that keeps all of it, else
    as it stands."""
    turn, where = turns[-1], f"{where}, turn {len(turns) - 1}"
    if not _squeezed(_words(turn)):
        raise PeftJaxError(f'{where} is an empty answer: leave it out, or give it "weight": 0')
    written = _written(turns, template, tools, where)
    token = first_mark(written.tail, template.marks)
    end = written.tail[:token.end()] if token else written.tail + (template.end if template.add_end else "")
    if _keeps(turn, written):
        text, closed = _cut(written.chat[len(written.prompt):], written.tail, end, template), False
    else:
        text, closed = _as_it_stands(turn, written, template, where)
        text += end
    ended = (bool(token or template.end) and text.endswith(end)) or _ends(text, template)
    return Answer(written.prompt, text, ended, closed)


def _written(turns: Sequence[Turn], template: Template, tools: Any, where: str) -> Written:
    def text(some_turns, generation_prompt=False):
        return _rendered(template.tokenizer, some_turns, generation_prompt, where, tools)

    before = turns[:-1]
    prompt, chat = text(before, True), text(turns)
    head, mark, tail = text([*before, {"role": "assistant", "content": MARK}]).rpartition(MARK)
    if not mark:
        raise PeftJaxError(f"{where}: this tokenizer's chat template does not write what the assistant answers")
    try:
        history = text(before)
    except PeftJaxError:  # a chat may begin with an answer, and then there is none
        history = ""
    return Written(history, prompt, chat, head, tail)


def _keeps(turn: Turn, written: Written) -> bool:
    """Whether the template writes a turn behind its prompt, whole; its start may be in the prompt, such as a tag."""
    return written.chat.startswith(written.prompt) and not _lost(
        turn, written.chat[min(alike(written.chat, written.before), len(written.prompt)):])


def _cut(text: str, tail: str, end: str, template: Template) -> str:
    """An answer with what follows it at the end of a chat, up to the token that ends it."""
    if text.endswith(tail):
        return text[:len(text) - len(tail)] + end
    last = [found.end() for found in template.marks[1].finditer(text)][-1:]
    return text[:last[0]] if last and not text[last[0]:].strip() else text


def _ends(text: str, template: Template) -> bool:
    """Whether a special token ends a text."""
    return any(found.end() == len(text) for found in template.marks[0].finditer(text))


def _as_it_stands(turn: Turn, written: Written, template: Template, where: str) -> tuple[str, bool]:
    """(a content behind its prompt, whether reasoning that the prompt opens had to be closed before it).

    What the prompt has beyond ``written.head`` is for the model to go on with. Where that is a tag, such as
    ``<think>``, the content begins in it or behind it.
    """
    opened, content = written.prompt[alike(written.prompt, written.head):], turn["content"]
    tag, reasoning = TAG.fullmatch(opened), next((turn[key] for key in REASONING if turn.get(key)), "")
    closed = bool(tag) and f"</{tag[1]}>" not in content
    if tag is None:
        text = content if opened else written.head[len(written.prompt):] + content
    elif closed:
        text = f"{reasoning}\n</{tag[1]}>\n\n{_body(turn, written) or content}"
    else:
        text = content.lstrip().removeprefix(f"<{tag[1]}>") if content.lstrip().startswith(tag[0].strip()) else content
        text = text.lstrip("\n") if opened.endswith("\n") else text
    if lost := _lost(turn, (opened if tag else "") + text):
        raise PeftJaxError(_left_out(turn, lost, template, where))
    return text, closed and not reasoning


def _body(turn: Turn, written: Written) -> str:
    """A turn as the template writes it without its reasoning, calls of tools too; "" where it leaves something out."""
    head, tail, chat = written.head, written.tail, written.chat
    body = chat[len(head):len(chat) - len(tail)] if chat.startswith(head) and chat.endswith(tail) else ""
    return "" if _lost({key: value for key, value in turn.items() if key not in REASONING}, body) else body


def _left_out(turn: Turn, lost: dict[str, str], template: Template, where: str) -> str:
    count, total = (len(template.tokenizer(words, add_special_tokens=False)["input_ids"])
                    for words in (" ".join(lost.values()), _words(turn)))
    return (f"{where}: the chat template leaves out its {some(list(lost))}, {count} of {total} tokens of the answer: "
            "write that into its content, as the model writes it, or leave it out")


def _lost(turn: Turn, text: str) -> dict[str, str]:
    """What of an answer is not in a text, spaces aside, by its key; of calls their names."""
    kept = _squeezed(text)
    return {key: words for key, words in _parts(turn).items() if _squeezed(words) not in kept}


def _parts(turn: Turn) -> dict[str, str]:
    parts = {key: str(turn[key]) for key in ("content", *REASONING) if turn.get(key)}
    calls = [call.get("function", call)["name"] for call in turn.get("tool_calls") or ()]
    return parts | {f"tool_calls[{i}]": name for i, name in enumerate(calls)}


def _words(turn: Turn) -> str:
    return " ".join(_parts(turn).values())


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _check_tools(tokenizer: Any, turns: Sequence[Turn], tools: Any, where: str) -> None:
    """Raise ``PeftJaxError`` where the template does not write the tools of an example."""
    if tools and _rendered(tokenizer, turns, True, where, tools) == _rendered(tokenizer, turns, True, where):
        raise PeftJaxError(f"{where} has tools, which this tokenizer's chat template does not write: leave them out, "
                           "or take a model that was taught to call tools")
