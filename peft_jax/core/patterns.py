"""Regular expressions of people and of files: compiled once, matched with a limit of time, as some would never end.

They are those of ``re``, which Hugging Face peft matches with; the package ``regex`` knows them too, and stops.
"""

import functools
import math
import re

import regex

from peft_jax.errors import PeftJaxError

MOST = 50_000  # characters; an alternation of all modules of a large model has a tenth
REPEATS = 100_000  # by the counts of one pattern together: counts inside counts are written out when it is compiled
SECONDS = (0.1, 1.0)  # a name takes microseconds; the second try is for a machine that was busy with something else


def fault(pattern: str) -> str:
    """Why ``pattern`` cannot be matched with, after its name; "" where it can.

    >>> fault(r".*proj"), fault("(")
    ('', 'is no regular expression: missing ), unterminated subpattern at position 0')
    """
    if len(pattern) > MOST:
        return f"has {len(pattern)} characters, more than {MOST}"
    counts = re.findall(r"\{(\d*),?(\d*)\}", pattern)
    if math.prod(max(1, int("0" + one[:9]), int("0" + other[:9])) for one, other in counts) > REPEATS:
        return f"repeats more than {REPEATS} times"
    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        return f"is no regular expression: {error}"
    return ""


@functools.lru_cache(maxsize=16384)
def compiled(pattern: str) -> "regex.Pattern[str]":
    """``pattern`` for :func:`match`. Raises ``PeftJaxError`` where it is none."""
    if why := fault(pattern):
        raise PeftJaxError(f"'{pattern:.200}' {why}.")
    return regex.compile(pattern)


def match(pattern: str, text: str, whole: bool = False) -> "regex.Match[str] | None":
    """As ``re.match``, or of the ``whole`` text.

    Raises ``PeftJaxError`` for what is no regular expression, and for one that takes too long.
    """
    program = compiled(pattern)
    for seconds in SECONDS:
        try:
            return (program.fullmatch if whole else program.match)(text, timeout=seconds)
        except (TimeoutError, MemoryError):
            pass
    raise PeftJaxError(f"the pattern '{pattern:.200}' takes over {SECONDS[-1]:g} s to be compared with '{text:.200}', "
                       "as its repetitions can share that out in too many ways: write it simpler, or give a list of "
                       "names.")
