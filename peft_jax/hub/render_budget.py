"""What one rendering of a chat template may make and take, and estimates of what its operations would make."""

import re
import time
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2.runtime import Macro
from jinja2.sandbox import MAX_RANGE

MOST_TEXT, MOST_TEXTS = 1 << 24, 1 << 28  # characters of one text or list, and of all that one rendering makes
MOST_BITS = 8192  # of a whole number
SECONDS = 1.0  # of the processor, for one rendering, which takes milliseconds
LOOK = 100  # steps, or thousands of characters, between two looks at the clock
TEXTS, CONTAINERS = (str, bytes), (list, tuple, set, dict)
COUNTED = (*TEXTS, *CONTAINERS, int)
ITEM = 50  # characters that an entry of a list counts as, beside its own: what Python takes for it

# Methods and filters whose result is as long as the sum, or the product, of their text and of their other arguments.
ADDING = {"center", "ljust", "rjust", "zfill", "batch", "slice", "truncate"}
MULTIPLYING = {"replace", "join", "indent", "tojson", "format", "expandtabs"}
# Those that make a list of a text's lines, words or characters.
SPLITTING = {"split", "rsplit", "splitlines", "batch", "groupby", "list", "map", "max", "min", "random", "reject",
             "rejectattr", "select", "selectattr", "slice", "sort", "sum", "unique"}
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# Widths of 1000 and more, or that are told elsewhere, in text that is formatted.
_WIDE = {"%": re.compile(r"%[^a-zA-Z%]*(\*|\d{4})"), "{": re.compile(r"\d{4}|\{[^{}]*\{")}


class Budget:
    """What is left of one rendering's time and texts; each method raises ``jinja2.TemplateError`` beyond that."""

    def __init__(self):
        self.left, self.end, self.unseen = MOST_TEXTS, time.thread_time() + SECONDS, 0

    def charge(self, count: int) -> None:
        self.left -= count
        self.unseen += 1 + count // 1000
        if self.left < 0:
            raise jinja2.TemplateError(f"it makes texts of over {MOST_TEXTS:,} characters")
        if self.unseen > LOOK:  # to look at the clock takes longer than what most steps do
            self.unseen = 0
            if time.thread_time() > self.end:
                raise jinja2.TemplateError(f"it takes over {SECONDS:g} s")

    def allow(self, count: int, most: int = MOST_TEXT) -> None:
        """Before something of ``count`` characters, or no more, is made."""
        if count > most:
            raise jinja2.TemplateError(f"it makes a text or a list of over {most:,} characters")

    def made(self, value: Any) -> Any:
        """``value``, which was made, counted."""
        count = len(value) if type(value) is str else size(value) if isinstance(value, COUNTED) else 1
        if count > MOST_TEXT:
            self.allow(count)
        self.charge(1 + count)
        return value

    def before(self, name: str, value: Any, others: tuple[Any, ...]) -> None:
        """Before the method or filter ``name`` of ``value`` with ``others``."""
        if name in MULTIPLYING:
            amount = sum(map(_amount, others)) + (check_format(value, others) if name == "format" else 0)
            self.allow((_amount(value) if hasattr(value, "__next__") else size(value) + 1) * (amount + 1), MOST_TEXTS)
        elif name in ADDING:
            self.allow(sum(map(_amount, others)))
        elif name == "round" and sum(map(_amount, others)) > 300:
            raise jinja2.TemplateError("it rounds to hundreds of places")
        elif name == "sum" and not all(isinstance(one, str | int | float) for one in others):
            raise jinja2.TemplateError("it sums up lists")
        if name in SPLITTING and isinstance(value, TEXTS):
            self.allow(ITEM * _pieces(name, value, others))


def size(value: Any) -> int:
    """About how many characters ``value`` has as text; what stands in it twice counts twice.

    Raises ``jinja2.TemplateError`` for what is no text, number, list or dict, as it may hold anything.
    """
    return _size(value, {})


def _size(value: Any, known: dict[int, int]) -> int:
    if isinstance(value, TEXTS):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3 + 1
    if isinstance(value, CONTAINERS):
        if id(value) not in known:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            known[id(value)] = sum(_size(part, known) + ITEM for part in parts)
        return known[id(value)]
    if value is None or isinstance(value, float | range | jinja2.Undefined | Macro):
        return 8
    raise jinja2.TemplateError(f"it writes something of type {type(value).__name__}")


def _amount(value: Any) -> int:
    """How many times, or characters, an argument asks for."""
    if isinstance(value, int):
        return abs(value)
    if hasattr(value, "__len__"):
        return len(value)
    return MAX_RANGE if hasattr(value, "__next__") else 0


def _pieces(name: str, text: Any, others: Sequence[Any]) -> int:
    """How many entries a list of a text's parts has, or no more."""
    if name == "splitlines":
        return len(text) if isinstance(text, bytes) else sum(map(text.count, LINE_ENDS))
    if name in ("split", "rsplit") and others and isinstance(others[0], TEXTS) and others[0]:
        return text.count(others[0])
    return len(text)


def check_format(text: Any, others: Sequence[Any] = (), kind: str = "") -> int:
    """The characters that formatting ``text`` puts in the place of a field, or fewer. Raises ``jinja2.TemplateError``
    where it asks for a large width."""
    if _WIDE[kind or ("{" if "{" in text else "%")].search(text):
        raise jinja2.TemplateError(f"it formats with '{text:.60}', a width of 1000 or more")
    return sum(map(size, others)) + 1000
