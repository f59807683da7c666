"""Errors for people: what went wrong, where, the nearest valid choice, what to do."""

import difflib
import errno
import os
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from types import ModuleType


class PeftJaxError(ValueError):
    """An error whose message is written for the user; ``run.py`` prints it as one line and exits with code 2."""


def nearest(word: str, choices: Iterable[str], most: int = 3) -> str:
    """A phrase naming the choices closest to ``word``, or the first few where none is close.

    >>> nearest("q_pro", ["q_proj", "k_proj", "embed"])
    'did you mean q_proj or k_proj?'
    """
    choices = sorted(set(map(str, choices)))
    if not choices:
        return "there are no choices"
    close = difflib.get_close_matches(str(word)[:200], choices, n=most, cutoff=0.7)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = ", ..." if len(choices) > 8 else ""
    return f"choose one of: {', '.join(choices[:8])}{more}"


def faults_text(faults: Mapping[str, Collection[str]]) -> str:
    """``"2 missing: a, b; 1 unexpected: c"``, "" where nothing is at fault."""
    return "; ".join(f"{len(found)} {kind}: {some(sorted(found))}" for kind, found in faults.items() if found)


def some(items: list[str], most: int = 5) -> str:
    """The first few of a list and how many more there are."""
    return ", ".join(items[:most]) + (f", and {len(items) - most} more" if len(items) > most else "")


def root_cause(error: BaseException) -> str:
    """The first error of a chain that each wrapped, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # errors of disks, which no code can mend


def disk_fault(error: BaseException) -> str:
    """What the disk says, where an error is of one: "No space left on device"; else the error itself, on one line.

    >>> disk_fault(ValueError("RESOURCE_EXHAUSTED: Error writing file: [OS error 28: No space left on device]"))
    'No space left on device'
    """
    said = [os.strerror(number) for number in DISK if getattr(error, "errno", None) == number or
            os.strerror(number) in str(error)]
    return said[0] if said else root_cause(error)


def needed(name: str, purpose: str) -> ModuleType:
    """The module ``name`` of a package that only some jobs need; ``purpose`` completes the error where it is lacking.

    >>> needed("jsonn", "to read a file")
    Traceback (most recent call last):
    ...
    peft_jax.errors.PeftJaxError: the package jsonn is needed to read a file, and is not installed: pip install jsonn
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # installed, but broken
            raise
        raise PeftJaxError(lacking(error, purpose)) from None


AT_PIP = {"absl": "absl-py", "orbax": "orbax-checkpoint", "jinja2": "Jinja2"}  # packages that pip knows by another name


def lacking(error: ModuleNotFoundError, purpose: str) -> str:
    """What to tell a person who lacks the package of a failed import.

    >>> lacking(ModuleNotFoundError(name="absl.flags"), "to read a command line")
    'the package absl is needed to read a command line, and is not installed: pip install absl-py'
    """
    name = str(error.name).partition(".")[0]
    return f"the package {name} is needed {purpose}, and is not installed: pip install {AT_PIP.get(name, name)}"
