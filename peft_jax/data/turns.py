"""Turns of a chat, in the shapes that people keep them in, as chat templates take them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peft_jax.errors import PeftJaxError, some

Example = dict[str, Any]  # as of sources.py
Turn = dict[str, Any]

# Names of roles in ShareGPT's shape and its relatives, by those that chat templates know.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "bard": "assistant",
         "bing": "assistant", "model": "assistant", "function_call": "assistant", "observation": "tool"}
KEYS = (("role", "content"), ("from", "value"))
LEARNT = ("weight", "train")  # OpenAI's and axolotl's key of a turn: 0 or false is left out of the loss
TEXT = (None, "text", "input_text", "output_text")  # types of parts


class Names(NamedTuple):
    """What a table calls things. keys: of a turn's role and its content, "" for the known one. roles: by their names
    in the table."""

    keys: tuple[str, str] = ("", "")
    roles: Mapping[str, str] = {}


PLAIN = Names()


def chat_of(example: Example, where: str, names: Names = PLAIN) -> Example:
    """An example that holds a chat, as ``{"messages": turns, ...}``; others stay.

    Known are messages in OpenAI's and ShareGPT's shape, a ``system`` text and ``tools`` (JSON, too) beside them, and
    prompt and completion that are lists of messages, of which those of the completion are learnt. Contents that are
    parts of text are joined. A call of a tool has its arguments as a dict where they are JSON.

    Raises:
      PeftJaxError: names ``where`` and what cannot be learnt, such as an image.
    """
    if isinstance(example.get("prompt"), list) or isinstance(example.get("completion"), list):
        example = _joined(example, where, names)
    if "messages" not in example:
        return example
    turns, others = turns_of(example["messages"], where, names), {k: v for k, v in example.items() if k != "system"}
    if example.get("system"):
        turns = with_system(turns, example["system"], where)
    if "tools" in others:
        others["tools"] = _tools(others["tools"], where)
    return {**others, "messages": turns}


def with_system(turns: list[Turn], system: str, where: str) -> list[Turn]:
    """Turns after a system prompt. Raises ``PeftJaxError`` where they have one of their own."""
    if turns and turns[0]["role"] == "system":
        raise PeftJaxError(f"{where} has a system text and a system turn, too: leave one out")
    return [{"role": "system", "content": system}, *turns]


def _joined(example: Example, where: str, names: Names) -> Example:
    """Of lists of messages, or one such list and a text: one chat, in which only the completion is learnt."""
    sides = {key: example.get(key) for key in ("prompt", "completion")}
    for (key, side), role in zip(sides.items(), ("user", "assistant")):
        if not isinstance(side, list):
            sides[key] = [{"role": role, "content": side}]
    before, after = (turns_of(side, where, names) for side in sides.values())
    before = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in before]
    return {**{k: v for k, v in example.items() if k not in sides}, "messages": [*before, *after]}


def turns_of(messages: Any, where: str, names: Names = PLAIN) -> list[Turn]:
    """``{"role", "content", ...}`` of each message; keys that hold ``None`` are left out, as a table fills them."""
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(one, dict) for one in messages):
        raise PeftJaxError(_no_messages(where))
    return [_turn({key: value for key, value in one.items() if value is not None}, f"{where}, turn {number}", where,
                  names) for number, one in enumerate(messages)]


def _no_messages(where: str) -> str:
    return f"{where}: messages must be a list of {{'role': ..., 'content': ...}}"


def _turn(turn: Turn, here: str, where: str, names: Names) -> Turn:
    role_key, content_key = next((keys for keys in KEYS if keys[0] in turn), KEYS[0])
    role_key, content_key = names.keys[0] or role_key, names.keys[1] or content_key
    role = turn.pop(role_key, None)
    if not isinstance(role, str):
        raise PeftJaxError(f"{_no_messages(where)}; turn {here.rpartition(' ')[2]} has the keys {some(list(turn))} "
                           "(task.role_key and task.content_key name others)")
    content = turn.pop(content_key, None)
    if role == "function_call":
        turn["tool_calls"], content = _called(content, here), ""
    if "function_call" in turn:  # OpenAI's older shape
        turn["tool_calls"] = _called(turn.pop("function_call"), here)
    if "tool_calls" in turn:
        turn["tool_calls"] = [_call(call, here) for call in turn["tool_calls"]]
    if content is None and not turn.get("tool_calls"):
        raise PeftJaxError(f"{_no_messages(where)}; turn {here.rpartition(' ')[2]} has no content")
    role = {**ROLES, **names.roles}.get(role, role)
    return {"role": role, "content": "" if content is None else _text(content, here), **turn}


def _text(content: Any, here: str) -> str:
    """A content as text: parts of text one after another, a number as it is written."""
    if isinstance(content, (int, float)) and not isinstance(content, bool):
        return str(content)
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else _part(part, here) for part in content)
    if not isinstance(content, str):
        raise PeftJaxError(f"{here}: its content must be text, found {type(content).__name__}")
    return content


def _part(part: Any, here: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT or not isinstance(part.get("text"), str):
        raise PeftJaxError(f"{here}: its content holds a part of type {kind!r}, and only text can be learnt: leave the "
                           "example out")
    return part["text"]


def _called(content: Any, here: str) -> list[Turn]:
    """Calls that a text, or a dict, names."""
    calls = _json(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or any(not isinstance(call, dict) or "name" not in call for call in calls):
        raise PeftJaxError(f"{here}: its function call must be {{'name': ..., 'arguments': ...}}, found "
                           f"{str(content)[:40]!r}")
    return [{"type": "function", "function": call} for call in calls]


def _call(call: Any, here: str) -> Turn:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise PeftJaxError(f"{here}: each of its tool_calls must be {{'function': {{'name': ..., 'arguments': ...}}}}")
    written = _json(function.get("arguments"))
    function = {**function, "arguments": written} if isinstance(written, dict) else function
    return {**call, "function": function} if "function" in call else function


def _json(text: Any) -> Any:
    """What a text holds as JSON; whatever is none, as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):  # the second of brackets in brackets
        return text


def _tools(tools: Any, where: str) -> list[Any] | None:
    tools = _json(tools) if tools else None
    if tools is not None and not isinstance(tools, list):
        raise PeftJaxError(f"{where}: tools must be a list of what each tool takes, or JSON of one, found "
                           f"{str(tools)[:40]!r}")
    return tools or None


def is_learnt(turn: Turn, where: str) -> bool:
    """Whether a turn is to be learnt, by what it says itself: an assistant's is unless it says no.

    Raises ``PeftJaxError`` for a weight between, and where another's turn is to be learnt, which cannot be.
    """
    marks = {key: turn[key] for key in LEARNT if key in turn}
    for key, value in marks.items():
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise PeftJaxError(f"{where} has {key!r}: {value!r}: write 1 or true where it is to be learnt, else 0 or "
                               "false")
    if turn["role"] == "assistant":
        return all(marks.values())
    if any(marks.values()):
        raise PeftJaxError(f"{where}, of the role {turn['role']!r}, is marked to be learnt, and only answers of the "
                           f"assistant are: leave out its {some(list(marks))}")
    return False


def shown(turns: Sequence[Turn]) -> list[Turn]:
    """Turns as a template sees them, without the marks of what is learnt."""
    return [{key: value for key, value in turn.items() if key not in LEARNT} for turn in turns]


def with_json_arguments(turns: Sequence[Turn]) -> list[Turn]:
    """Turns whose calls of tools have their arguments as JSON, as some templates take them."""
    return [{**turn, "tool_calls": [_with_json(call) for call in turn["tool_calls"]]} if turn.get("tool_calls")
            else turn for turn in turns]


def _with_json(call: Turn) -> Turn:
    if "function" in call:
        return {**call, "function": _with_json(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, dict) else call
