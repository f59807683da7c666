"""Ways to damage a file, a JSON value, or what lies under a name."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

SURROGATE, NUL = "\ud800", "\0"
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**9, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e39, 1e308, float("nan"),
    float("inf"), float("-inf"), "", "a", "0", "64", "nan", "None", "x" * 300, SURROGATE, NUL, "../../etc/passwd",
    "(a+)+$", "__class__", [], [1], ["a"], [None], [[]], {}, {"a": 1}, {"": {}}, {"r": 10**9}, [[[[[[[[[]]]]]]]]],
)


def paths(value: Any, here: tuple = ()) -> Iterator[tuple]:
    """The place of everything in a JSON value, as keys and indices."""
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in members:
        yield (*here, key)
        yield from paths(one, (*here, key))


def put(value: Any, place: tuple, new: Any) -> Any:
    """A copy of ``value`` with ``new`` at a place."""
    value = copy.deepcopy(value)
    at(value, place[:-1])[place[-1]] = new
    return value


def drop(value: Any, place: tuple) -> Any:
    """A copy of ``value`` without what is at a place."""
    value = copy.deepcopy(value)
    del at(value, place[:-1])[place[-1]]
    return value


def at(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


def dumped(value: Any, rng: Random) -> bytes:
    """A JSON text of the value, laid out in one way or another."""
    return json.dumps(value, indent=rng.choice((None, 0, 2)), ensure_ascii=rng.random() < 0.5 or "\\ud" in json.dumps(
        value)).encode()


def shuffled(value: dict[str, Any], rng: Random) -> dict[str, Any]:
    """The same with its keys in another order."""
    return dict(rng.sample(list(value.items()), len(value)))


def nested(rng: Random) -> bytes:
    depth = rng.choice((50, 900, 990, 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opening * depth + (b"1" + closing * depth) * (rng.random() < 0.5)


def bytes_of(content: bytes, rng: Random) -> tuple[str, bytes]:
    """(what was done, content): cut, turned over, emptied, or replaced, at random."""
    place = rng.randrange(len(content) + 1)
    flipped = bytearray(content or b" ")
    for _ in range(rng.choice((1, 1, 2, 16))):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return rng.choice((
        (f"cut at byte {place}", content[:place]), ("empty", b""), ("bits turned over", bytes(flipped)),
        ("binary", rng.randbytes(200)), ("zeros", bytes(len(content))), ("a NUL inside", content[:place] + b"\0" +
                                                                         content[place:]),
        ("deep", nested(rng)), ("no UTF-8 inside", content[:place] + b"\xff\xfe" + content[place:]),
        ("twice", content + content), ("a number", b"3"), ("null", b"null"), ("a list", b"[]"), ("an object", b"{}"),
        ("NaN", b"NaN"), ("UTF-16", content.decode("utf-8", "replace").encode("utf-16"))))  # fmt: skip


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path], Any]] = {
    "a folder": _folder, "a pipe": os.mkfifo, "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path: path.symlink_to("/nowhere/at/all"), "a link to itself": lambda path:
    path.symlink_to(path), "missing": lambda path: None, "a terabyte": _sparse, "/dev/full": lambda path:
    path.symlink_to("/dev/full"), "a link to a pipe": lambda path: _link_to_a_pipe(path),
}  # fmt: skip


def _link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name(path.name + ".pipe"))
    path.symlink_to(path.with_name(path.name + ".pipe"))


def kind_of(path: Path, rng: Random) -> str:
    """Put something else in the place of a file, or of a folder; says what."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    name = rng.choice(list(KINDS))
    KINDS[name](path)
    return f"{path.name} is {name}"
