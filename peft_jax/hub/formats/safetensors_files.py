"""The tensors of a folder in Hugging Face's layout, listed without being read."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax import errors
from peft_jax.core import files
from peft_jax.errors import PeftJaxError

WHAT, AGAIN = "safetensors", "its tensors are damaged; fetch it again"
MOST_HEADER = 32 << 20  # bytes; a shard of ten thousand tensors has one
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
          "BOOL": "bool"}


def tensors(folder: Path) -> dict[str, "Tensor"]:
    """``{name: Tensor}`` of all safetensors files of a model.

    Raises ``PeftJaxError`` where there are none, or one is damaged.
    """
    listed: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        found = tensors_of(file)
        if double := found.keys() & listed.keys():
            raise PeftJaxError(f"{file} has the tensor '{min(double)}', which {listed[min(double)].file.name} has "
                               "too: fetch the model again.")
        listed |= found
    return listed


def _weight_files(folder: Path) -> list[Path]:
    """All ``.safetensors`` files that the index names, or the single file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if os.path.lexists(single):
        return [single]
    if not os.path.lexists(index):
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        reason = f"only {pickled[0]}, a pickle, which can run code when read" if pickled else "no weights"
        raise PeftJaxError(f"{folder} has {reason}: give a folder with model.safetensors (transformers' "
                           "save_pretrained writes one).")
    named = files.read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise PeftJaxError(f"{index} has no weight_map: fetch it again.")
    names = sorted({Path(file).name for file in named.values()})
    absent = [name for name in names if not os.path.lexists(folder / name)]
    if absent:
        raise PeftJaxError(f"{folder} lacks {errors.some(absent)}, which {index.name} names: fetch the missing files.")
    return [folder / name for name in names]


class Tensor(NamedTuple):
    """A tensor in a safetensors file; ``dtype`` as numpy calls it, or the file where numpy has none."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """The tensor. Raises ``PeftJaxError`` where the file is damaged, or the type one that numpy lacks."""
        from safetensors import safe_open

        self.check_type()
        # Opened for one tensor only: while a file stays mapped, what was read of it counts as this process's memory.
        with files.reading(self.file, WHAT, AGAIN), safe_open(self.file, framework="np") as opened:
            return opened.get_tensor(self.name)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def check_type(self) -> None:
        """Raise ``PeftJaxError`` for a type that numpy lacks."""
        if self.dtype not in DTYPES.values():
            raise PeftJaxError(f"{self.file} has tensors of a type that cannot be read ('{self.name}' is {self.dtype}):"
                               " save it as float32, float16 or bfloat16.")


def tensors_of(file: Path) -> dict[str, Tensor]:
    """``{name: Tensor}`` of one file, by its header alone.

    Raises ``PeftJaxError`` for a damaged one. What the header says of places in the file, safetensors checks.
    """
    from safetensors import safe_open

    files.regular_file(file, "tensors are read from files")
    with files.reading(file, WHAT, AGAIN):
        described = _header(file)
        with safe_open(file, framework="np") as opened:
            names = list(opened.keys())
        return {name: Tensor(file, name, tuple(described[name]["shape"]),
                             DTYPES.get(described[name]["dtype"]) or str(described[name]["dtype"])) for name in names}


def _header(file: Path) -> dict[str, Any]:
    """What stands in front of the tensors: safetensors reads larger ones, and takes the second of two of a name."""
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if size > MOST_HEADER:
            raise ValueError(f"its header would have {size:,} bytes")
        return files.parse_json(opened.read(size).decode("utf-8"))
