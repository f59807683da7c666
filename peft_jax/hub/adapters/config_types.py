"""Whether the fields of an ``adapter_config.json`` have the types of the method's arguments."""

import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from peft_jax.core import patterns
from peft_jax.errors import PeftJaxError

# Fields that are no arguments of ours.
_FLAGS = ("ensure_weight_tying", "fan_in_fan_out", "inference_mode", "prefix_projection", "save_projection", "use_dora")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", NoneType: "null"}
_SEVERAL = {bool: "truth values", int: "whole numbers", float: "numbers", str: "strings"}


def check_flags(path: Path, content: Mapping[str, Any]) -> None:
    """Raise ``PeftJaxError`` where a field that is true or false, whatever the method, is neither."""
    for name in _FLAGS:
        if name in content:
            _check(path, name, content[name], bool | None)


def check(path: Path, fields: Mapping[str, Any], make: Callable[..., Any]) -> None:
    """Raise ``PeftJaxError`` where a field is not what ``make`` says of its argument, or holds a regex that is none.

    Args:
      fields: the file's, as JSON gives them.
      make: the method's function; its annotations are the types.
    """
    parameters = inspect.signature(make).parameters
    for name in [name for name in fields if name in parameters]:
        kind = parameters[name].annotation
        _check(path, name, fields[name], kind)
        if any(_several(one) for one in _kinds(kind)):
            _check_regexes(path, name, fields[name])


def _check(path: Path, name: str, value: Any, kind: Any) -> None:
    if isinstance(value, list | dict) and len(value) > _most(value):
        raise PeftJaxError(f"{path} has {name} of {len(value):,} entries, and no model needs more than "
                           f"{_most(value):,}: save the adapter again.")
    if not any(_fits(value, one) for one in _kinds(kind)):
        words = " or ".join(dict.fromkeys(map(_phrase, _kinds(kind))))
        raise PeftJaxError(f"{path} has {name}={reprlib.repr(value)}, where {words} belongs: correct it or save the "
                           "adapter again.")


def _most(value: list | dict) -> int:
    """Entries: of objects, whose keys are patterns; of lists of names; of lists of numbers, such as tokens."""
    if isinstance(value, dict):
        return 4096
    return 25_000 if any(isinstance(one, str) for one in value) else 1 << 20


def _check_regexes(path: Path, name: str, value: Any) -> None:
    """A string that stands for names, and keys of patterns, are regular expressions; a list holds names, but of one
    field, whose words stand inside an expression."""
    several = isinstance(value, dict) or (isinstance(value, list) and name == "layers_pattern")
    for regex in [one for one in (value if several else [value]) if isinstance(one, str)]:
        if why := patterns.fault(regex):
            raise PeftJaxError(f"{path} has {name} with '{regex:.200}', which {why}.")


def _kinds(kind: Any) -> tuple[Any, ...]:
    """The members of a union, ``(kind,)`` where it is none."""
    return (kind,) if _several(kind) or not get_args(kind) else get_args(kind)


def _several(kind: Any) -> bool:
    """Whether it is a type with items: a tuple, a list, a mapping."""
    return isinstance(get_origin(kind), type) and issubclass(get_origin(kind), tuple | list | Mapping | Sequence)


def _item(kind: Any) -> Any:
    return get_args(kind)[1 if issubclass(get_origin(kind), Mapping) else 0]


def _fits(value: Any, kind: Any) -> bool:
    if not _several(kind):
        kinds = (int, float) if kind is float else kind
        return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if issubclass(get_origin(kind), Mapping):
        return isinstance(value, dict) and all(_fits(one, _item(kind)) for one in value.values())
    return isinstance(value, list) and all(_fits(one, _item(kind)) for one in value)


def _phrase(kind: Any) -> str:
    if not _several(kind):
        return _WORDS[kind]
    item, mapping = _item(kind), issubclass(get_origin(kind), Mapping)
    items = "lists" if _several(item) else _SEVERAL[item]
    return f"an object of {items}" if mapping else f"a list of {items}"
