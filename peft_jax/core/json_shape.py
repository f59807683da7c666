"""Whether a JSON value is of the types that its reader relies on, so that no reader meets another one halfway."""

import json
from typing import Any

Shape = Any  # see misfit
NUMBER = (int, float)


def misfit(value: Any, shape: Shape, name: str = "") -> str:
    """What does not fit, in words, with its name below ``name``; "" where all does.

    Args:
      shape: a type, or a tuple of them (``bool`` is none of int's); ``[shape]``: a list of such; ``{str: shape}``: an
        object of such; ``{"key": shape}``: an object with this key at least.

    >>> misfit({"loss": [1, "2"]}, {"loss": [NUMBER]}), misfit([], {"loss": int}), misfit({"a": 1}, {str: int})
    ('loss.1 is "2", not int or float', 'it is [], not an object', '')
    """
    if isinstance(shape, list):
        parts = [(str(number), one, shape[0]) for number, one in enumerate(value)] if isinstance(value, list) else None
    elif isinstance(shape, dict):
        parts = _members(value, shape) if isinstance(value, dict) else None
    else:
        kinds = shape if isinstance(shape, tuple) else (shape,)
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)) and not _is_huge(value)
        return "" if fits else _told(name, value, " or ".join(kind.__name__ for kind in kinds))
    if parts is None:
        return _told(name, value, "a list" if isinstance(shape, list) else "an object")
    return next(filter(None, (misfit(one, part, f"{name}.{key}".lstrip(".")) for key, one, part in parts)), "")


def _members(value: dict[str, Any], shape: dict[Any, Shape]) -> list[tuple[str, Any, Shape]]:
    """(key, what is there, its shape); None is there where nothing is."""
    if str in shape:
        return [(key, one, shape[str]) for key, one in value.items()]
    return [(key, value.get(key), part) for key, part in shape.items()]


def _told(name: str, value: Any, expected: str) -> str:
    return f"{name or 'it'} is {short(value)}, not {expected}{' below 2**64' * _is_huge(value)}"


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= 2**64


def short(value: Any) -> str:
    """The value in a few letters; what an object or a list of such holds, which may be deep, is left out."""
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if any(isinstance(one, list | dict) or _is_huge(one) for one in members):
        return "[...]" if isinstance(value, list) else "{...}"
    return json.dumps(value)[:40] if not _is_huge(value) else "a number of hundreds of digits"
