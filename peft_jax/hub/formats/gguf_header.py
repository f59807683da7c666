"""The header of a ``.gguf`` file: what it says of the model, and where its tensors lie, each held against the file.

The ``gguf`` package, whose tables of types are used, reads headers too, but believes them: a count that is too large
keeps it busy for ever, an offset that is too large wraps around, and a vocabulary takes it seconds. Format:
github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core import files
from peft_jax.errors import PeftJaxError, needed

WHAT = "a GGUF file"
MOST_BYTES = 64 << 20  # of a header; a vocabulary of 256 thousand tokens takes 15 MB
MOST_KEYS, MOST_TENSORS, MOST_ITEMS, MOST_AXES = 10_000, 100_000, 1 << 22, 4
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's


class Info(NamedTuple):
    """A tensor: its type in the ``gguf`` package, its shape as numpy has it, its first byte in the file, the count."""

    file: Path
    name: str
    kind: Any
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def rows(self) -> np.ndarray:
        """Its bytes, uint8 (*shape without the last axis, bytes of a row)."""
        with files.reading(self.file, WHAT):  # not through a map of the file, which counts as this process's memory
            data = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.start)
            return data.reshape(*self.shape[:-1], -1)

    def floats(self) -> np.ndarray:
        """Its values, float32. Raises ``PeftJaxError`` for a type that is not read."""
        from gguf.quants import dequantize

        try:
            return np.asarray(dequantize(self.rows(), self.kind), np.float32)
        except NotImplementedError as error:
            raise PeftJaxError(f"{self.file}: its tensor '{self.name}' is of type {self.kind.name}, which is not read: "
                               "use the model's safetensors folder instead.") from error


class Header(NamedTuple):
    """fields: the metadata by key, arrays as lists. tensors: by name, in the file's order."""

    fields: dict[str, Any]
    tensors: dict[str, Info]


def read(path: Path) -> Header:
    """The header of a file. Raises ``PeftJaxError`` for whatever in it is not so as the format has it."""
    needed("gguf", f"to read {path}")
    size = files.regular_file(path, "a model").stat().st_size
    with (files.reading(path, f"{WHAT} (damaged, or another format)"), open(path, "rb") as file,
          mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data):
        cursor = _Cursor(data)
        tensors, keys = _counts(cursor)
        fields: dict[str, Any] = {}
        for _ in range(keys):
            key = cursor.string()
            if key in fields:
                raise ValueError(f"the key '{key:.60}' stands there twice")
            fields[key] = cursor.value(cursor.number("I"))
        described = [_description(cursor) for _ in range(tensors)]
        return Header(fields, _placed(path, described, cursor.at, _alignment(fields), size))


def _counts(cursor: "_Cursor") -> tuple[int, int]:
    """How many tensors and keys follow."""
    magic, version = cursor.bytes(4), cursor.number("I")
    if magic != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if version & 0xFFFF == 0:
        raise ValueError("it is of the other byte order, for which other machines are made")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, and 2 and 3 are read")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if tensors > MOST_TENSORS or keys > MOST_KEYS:
        raise ValueError(f"it says that it has {tensors:,} tensors and {keys:,} keys")
    return tensors, keys


class _Cursor:
    """A place in a file that is read onwards, never past its end."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def bytes(self, count: int) -> bytes:
        if count > min(len(self.data), MOST_BYTES) - self.at:
            raise ValueError(f"{count:,} bytes belong to its header at byte {self.at:,}, and there are fewer")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.bytes(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _NUMBERS:
            raise ValueError(f"a value of the unknown type {kind} stands at byte {self.at:,}")
        return self.number(_NUMBERS[kind])

    def array(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        if count > MOST_ITEMS or kind not in (_STRING, *_NUMBERS):
            raise ValueError(f"a list of {count:,} values of type {kind} stands at byte {self.at:,}")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        form = f"<{count}{_NUMBERS[kind]}"
        return list(struct.unpack(form, self.bytes(struct.calcsize(form))))


def _alignment(fields: dict[str, Any]) -> int:
    value = fields.get("general.alignment", 32)
    if type(value) is not int or not 1 <= value <= 1 << 20 or value & (value - 1):
        raise ValueError(f"general.alignment is {value!r:.40}, where a power of two belongs")
    return value


def _description(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, number of the type, offset) of a tensor."""
    name, axes = cursor.string(), cursor.number("I")
    if axes > MOST_AXES:
        raise ValueError(f"its tensor '{name:.60}' would have {axes:,} axes")
    shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
    return name, shape, cursor.number("I"), cursor.number("Q")


def _placed(path: Path, described: list[tuple[str, tuple[int, ...], int, int]], end: int, alignment: int,
            size: int) -> dict[str, Info]:
    """The tensors of a file of ``size`` bytes, of its header ``end``: one behind the other, as llama.cpp has it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    first, expected, tensors = end + -end % alignment, 0, {}
    for name, shape, number, offset in described:
        kind = GGMLQuantizationType(number)
        values, block = GGML_QUANT_SIZES[kind]
        if name in tensors or not shape or min(shape) < 1 or shape[-1] % values:
            raise ValueError(f"its tensor '{name:.60}' stands there twice" if name in tensors else
                             f"its tensor '{name:.60}' of type {kind.name} has the shape {list(shape)}")
        if offset != expected:
            raise ValueError(f"its tensor '{name:.60}' is said to begin at byte {offset:,} of the data, and the one "
                             f"before it ends so that it begins at {expected:,}")
        nbytes = math.prod(shape) // values * block
        if first + offset + nbytes > size:
            raise ValueError(f"its tensor '{name:.60}' would end at byte {first + offset + nbytes:,}, and the file has "
                             f"{size:,}: it is cut short")
        tensors[name] = Info(path, name, kind, shape, first + offset, nbytes)
        expected = offset + nbytes + -nbytes % alignment
    return tensors
