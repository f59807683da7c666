"""What travels between devices in a compiled program: its collectives, as often as their loops turn."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
         "u64": 8, "f64": 8}
_RESULT = re.compile(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One array that travels. kind, element type and shape of what a device has afterwards, in one turn; times: how
    often in the whole program; where: the operation that asked for it."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    times: int
    where: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of one turn."""
        return self.size * BYTES[self.dtype]


def collectives(text: str) -> list[Collective]:
    """All collectives of a compiled program's text (``compiled.as_text()``), a tuple's parts one by one.

    Loops whose number of turns the compiler does not know count once, of a conditional every branch.

    >>> collectives("ENTRY %main {\\n  %a = f32[2,8]{1,0} all-gather(%p)\\n}")
    [Collective(kind='all-gather', dtype='f32', shape=(2, 8), times=1, where='')]
    """
    parts, entry = _computations(text)
    return _within(parts, entry, 1)


def moved(found: Iterable[Collective], devices: int) -> int:
    """Bytes that each device receives, if all ``devices`` take part in rings: a gathered array but for its own part, a
    summed one twice that (https://docs.nvidia.com/deeplearning/nccl, arXiv:1802.05799, section 3)."""
    share = (devices - 1) / devices
    factor = {"all-reduce": 2 * share, "reduce-scatter": devices * share, "collective-permute": 1}
    return round(sum(one.bytes * one.times * factor.get(one.kind, share) for one in found))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, the name of the entry)."""
    parts, name, entry = {}, "", ""
    for line in text.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.-]+)[ (].*\{\s*$", line):
            name = opened[2]
            entry = name if opened[1] else entry
            parts[name] = []
        elif name:
            parts[name].append(line)
    return parts, entry


def _within(parts: dict[str, list[str]], name: str, times: int) -> list[Collective]:
    found = []
    for line in parts.get(name, ()):
        if match := _RESULT.match(line):
            found += [one._replace(times=times) for one in _arrays(match[1], match[2], match[3], line)]
        turns = int(asked[1]) if (asked := _TURNS.search(line)) else 1
        branches = _BRANCHES.search(line)
        inner = [] if match else _CALLED.findall(line) + (re.findall(r"[\w.-]+", branches[1]) if branches else [])
        for called in inner:
            found += _within(parts, called, times * turns)
    return found


def _arrays(result: str, kind: str, start: str | None, line: str) -> list[Collective]:
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    arrays = [array for array in arrays if array[0] in BYTES]
    if start and len(arrays) > 1 and kind != "all-reduce":  # (operands, results)
        arrays = arrays[len(arrays) // 2:]
    where = named[1] if (named := re.search(r'op_name="([^"]*)"', line)) else ""
    return [Collective(kind, dtype, tuple(int(size) for size in sizes.split(",") if size), 1, where)
            for dtype, sizes in arrays]
