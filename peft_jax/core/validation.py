"""Arguments of the wrong type, or out of range, as errors of one line: each check raises ``PeftJaxError``."""

import reprlib
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

from peft_jax.core import patterns
from peft_jax.errors import PeftJaxError, nearest


def check_modules(name: str, modules: Any) -> None:
    """Raise ``PeftJaxError`` unless ``modules`` is a list of names, a regex or ``None``."""
    entries = modules if isinstance(modules, list | tuple) else (modules,)
    if not all(one is None or isinstance(one, str) for one in entries):
        raise PeftJaxError(f"{name}={modules!r}: give names or None.")
    check_regexes([modules] if isinstance(modules, str) else [])


def as_names(names: Any) -> Any:
    """One name as a tuple of it; a list of names, or ``None``, as it is."""
    return (names,) if isinstance(names, str) else names


def check_regexes(regexes: Sequence[str]) -> None:
    """Raise ``PeftJaxError`` for the first that is no regular expression, or one without bounds."""
    for regex in regexes:
        patterns.compiled(regex)


def check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PeftJaxError(f"{name}={reprlib.repr(value)}: a rank is a whole number of at least 1.")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PeftJaxError(f"{name}={value!r}: give a whole number of at least {least}.")


def is_id(one: Any) -> bool:
    """Whether ``one`` can be a token id: True and False, which Python counts as integers, cannot."""
    return isinstance(one, Integral) and not isinstance(one, bool) and int(one) >= 0


def check_ids(name: str, ids: Any) -> None:
    """Raise ``PeftJaxError`` unless ``ids`` is ``None`` or at least one token id."""
    numbers = ids.tolist() if hasattr(ids, "tolist") else ids  # arrays, whose numbers are no Integral in jax
    several = isinstance(numbers, Collection) and len(numbers)
    if ids is not None and not (several and all(map(is_id, numbers))):
        raise PeftJaxError(f"{name}={ids!r}: give token ids, at least one, such as (504, 3216).")


LARGEST = 3.4e38  # of float32, which every method computes its scales in


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a number, and one in float32, too: 10**400 is none in any type of floats."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def check_number(name: str, value: Any) -> None:
    if not is_finite(value):
        raise PeftJaxError(f"{name}={reprlib.repr(value)}: give a finite number.")


def check_alpha(name: str, value: Any) -> None:
    """Raise ``PeftJaxError`` where ``value`` is no number, or zero: then no update ever changes anything."""
    check_number(name, value)
    if value == 0:
        raise PeftJaxError(f"{name}=0 leaves nothing to train: give another number.")


def check_probability(name: str, value: Any) -> None:
    check_number(name, value)
    if not 0 <= value < 1:
        raise PeftJaxError(f"{name}={value!r}: a probability of at least 0 and below 1.")


def check_patterns(config: Mapping[str, Any], rank: str, alpha: str) -> None:
    """Raise ``PeftJaxError`` where ``rank`` or ``rank_pattern`` has what is no rank; of ``alpha`` likewise."""
    for name, pattern, check in ((rank, "rank_pattern", check_rank), (alpha, "alpha_pattern", check_alpha)):
        check_pattern(pattern, config[pattern])
        check(name, config[name])
        for key, value in (config[pattern] or {}).items():
            check(f"{pattern}['{key}']", value)


def check_pattern(name: str, pattern: Any) -> None:
    """Raise ``PeftJaxError`` unless ``pattern`` is ``{regex: value}`` or ``None``."""
    if not isinstance(pattern, Mapping | None) or not all(isinstance(key, str) for key in pattern or ()):
        raise PeftJaxError(f"{name}={pattern!r}: give a dict, such as {{'layers.0.self_attn.q_proj': 4}}.")
    check_regexes(list(pattern or ()))


def check_settings(name: str, settings: Any, defaults: Mapping[str, Any], example: str) -> dict[str, Any]:
    """``defaults`` with those of the dict ``settings`` in their place.

    Raises ``PeftJaxError`` where ``settings`` is no dict, or has a key that ``defaults`` lack.
    """
    if not isinstance(settings, Mapping | None):
        raise PeftJaxError(f"{name}={settings!r}: give a dict, such as {example}.")
    for key in settings or {}:
        if key not in defaults:
            raise PeftJaxError(f"{name}['{key}']: {nearest(key, defaults)}")
    return {**defaults, **(settings or {})}


def check_switches(config: Mapping[str, Any], *names: str) -> None:
    """Raise ``PeftJaxError`` where an argument is neither True nor False: the text "False" would count as true."""
    for name in names:
        check_choice(name, config[name], (True, False))


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise PeftJaxError(f"{name}={value!r}: {nearest(str(value), map(str, choices))}")
