"""Chat templates of tokenizers: what they write, and the token that ends an answer in them."""

import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from peft_jax.errors import PeftJaxError, needed

ASKED, ANSWERED, NEXT = "questionasked", "answergiven", "questionnext"  # stand for texts; no template writes them
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]

REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a turn, the one that templates read first

Turns = Sequence[dict[str, Any]]


class Stops(NamedTuple):
    """Where a text that a model writes ends.

    ids: tokens that end it, the tokenizer's eos first. end_of_turn: the one that the chat template writes behind an
    answer, "" where it writes none.
    """

    ids: tuple[int, ...]
    end_of_turn: str


def render(tokenizer: Any, messages: Turns, generation_prompt: bool, where: str, tools: Any = None) -> str:
    """``messages`` as the tokenizer's chat template writes them, with ``tools`` that the assistant may call.

    Raises ``PeftJaxError``, naming ``where``, where it cannot.
    """
    needed("jinja2", "for a model's chat template")
    from peft_jax.hub import bounded_jinja

    with _naming(where, len(messages)):
        template = tokenizer.get_chat_template(None, tools or None)
        return bounded_jinja.render(template, messages=[_with_reasoning(plain(turn)) for turn in messages],
                                    tools=plain(list(tools)) if tools else None, documents=None,
                                    add_generation_prompt=generation_prompt, **tokenizer.special_tokens_map)


@contextlib.contextmanager
def _naming(where: str, turns: int) -> Iterator[None]:
    """Whatever goes wrong inside, on one line: jinja raises what a template asks for; a missing one is a ValueError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PeftJaxError(f"{where}: the tokenizer's chat template cannot render {turns} turns: {reason}") from error


def plain(value: Any) -> Any:
    """``value`` of texts, numbers, lists and dicts alone, as templates see it: what else there is becomes text.

    >>> plain({"turns": ("a", 1j)})
    {'turns': ['a', '1j']}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if value is None or type(value) in (str, int, float, bool) else str(value)


def _with_reasoning(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn with its reasoning under the names that templates know, as transformers gives it."""
    reasoning = next((turn[key] for key in REASONING if turn.get(key) is not None), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def marks(tokenizer: Any) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Match the tokens that no text spells, such as ``<|im_end|>``: the special ones, and all, with such as
    ``</tool_call>``, which may stand before one of those. Where there is none they match nothing."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    return _any_of(token for token in tokens if token.special), _any_of(tokens)


def _any_of(tokens: Iterable[Any]) -> re.Pattern[str]:
    contents = {token.content for token in tokens}
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or r"(?!)")


def first_mark(text: str, patterns: Iterable[re.Pattern[str]]) -> re.Match[str] | None:
    """The first match of the first pattern that matches."""
    return next((found for pattern in patterns if (found := pattern.search(text))), None)


def end_of_turn(tokenizer: Any) -> str:
    """The token that the chat template writes behind an assistant's answer: at the end of a chat, or else before the
    next question, the mark that opens that one aside. "" without such a token, or without a template."""
    if not tokenizer.chat_template:
        return ""
    try:
        last = render(tokenizer, CHAT, False, "a chat")
        more = render(tokenizer, [*CHAT, {"role": "user", "content": NEXT}], False, "a chat")
    except PeftJaxError:
        return ""  # whoever needs the template is told
    patterns = marks(tokenizer)
    found = first_mark(last.partition(ANSWERED)[2], patterns) or first_mark(_between(more), patterns)
    return found[0] if found else ""


def _between(chat: str) -> str:
    """What stands between an answer and the next question, without what stands before the first question, too."""
    head, gap = chat.partition(ASKED)[0], chat.partition(ANSWERED)[2].partition(NEXT)[0]
    return gap[:len(gap) - alike(head[::-1], gap[::-1])]


def alike(one: str, other: str) -> int:
    """How many characters two texts start with alike."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def stops(tokenizer: Any) -> Stops:
    """Where a text ends that a model writes: at the tokenizer's eos, and at its chat template's end of a turn."""
    end = end_of_turn(tokenizer)
    ids = (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end) if end else None)
    return Stops(tuple(dict.fromkeys(one for one in ids if one is not None)), end)


def describe_stops(tokenizer: Any) -> str:
    """One line for people about a chat template whose turns end with another token than eos; "" where they do not."""
    end = end_of_turn(tokenizer)
    if not end or end == tokenizer.eos_token:
        return ""
    other = f", and at {tokenizer.eos_token}" if tokenizer.eos_token else ""
    return f"a text ends at {end}, as the chat template's turns do{other}"
