"""What is tried, and what came of it."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peft_jax.errors import LONGEST, PeftJaxError

FAILURES = ("traceback", "hang", "memory", "silent", "harmless refused")
OUTCOMES = ("refused", "accepted", *FAILURES)


class Trial(NamedTuple):
    """One malformed input.

    what: was done to the input, for people. read: the reader under trial. judge: what is wrong about what the reader
    gave, "" if nothing. harmless: the input says the same as the undamaged one, so it may not be refused.
    """

    what: str
    read: Callable[[], Any]
    judge: Callable[[Any], str]
    harmless: bool = False


class Outcome(NamedTuple):
    """kind: one of ``OUTCOMES``. said: the error's line, the traceback's end, or what is wrong."""

    kind: str
    said: str


def outcome_of(trial: Trial) -> Outcome:
    """Read the input of a trial, and say what came of it."""
    try:
        result = trial.read()
    except PeftJaxError as error:
        if not str(error).isprintable() or len(str(error)) > LONGEST:
            return Outcome("traceback", f"a refusal of more than one line: {str(error)[:200]!r}")
        return Outcome("harmless refused" if trial.harmless else "refused", str(error))
    except MemoryError:
        return Outcome("memory", "MemoryError")
    except (Exception, SystemExit) as error:
        return Outcome("traceback", ended(error))
    wrong = trial.judge(result)
    return Outcome("silent", wrong) if wrong else Outcome("accepted", "")


def ended(error: BaseException) -> str:
    """Type, message and the last place in the package of an error."""
    place, frames = "", error.__traceback__
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if "/site-packages/" not in file and "/benchmarks/fuzz/" not in file and "/lib/python" not in file:
            place = f" at {'/'.join(file.split('/')[-3:])}:{frames.tb_lineno}"
        frames = frames.tb_next
    return f"{type(error).__name__}{place}: {str(error)[:300]}"


def equal(base: Any) -> Callable[[Any], str]:
    """A judge: the result is that of the undamaged input."""
    return lambda result: "" if same(result, base) else f"it is another result: {differences(base, result)}"


def never(result: Any) -> str:
    """A judge: nothing may come of such an input."""
    return "it was accepted, and cannot be meant"


def same(one: Any, other: Any) -> bool:
    """Equal, a NaN to a NaN too."""
    return one == other or json.dumps(one, default=repr, sort_keys=True) == json.dumps(other, default=repr,
                                                                                      sort_keys=True)


def differences(base: Any, result: Any) -> str:
    """The first keys that differ, of mappings; else both in short."""
    if isinstance(base, Mapping) and isinstance(result, Mapping):
        odd = [key for key in {**base, **result} if not same(base.get(key), result.get(key))]
        return "; ".join(f"{key} was {str(base.get(key))[:60]}, is {str(result.get(key))[:60]}" for key in odd[:3])
    return f"was {str(base)[:100]}, is {str(result)[:100]}"
