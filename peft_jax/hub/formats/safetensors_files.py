"""The tensors of a folder in Hugging Face's layout, listed without being read."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_jax import errors
from peft_jax.core import files
from peft_jax.errors import PeftJaxError


def tensors(folder: Path) -> dict[str, "Tensor"]:
    """``{name: Tensor}`` of all safetensors files of a model.

    Raises ``PeftJaxError`` where there are none, and ``SafetensorError`` where one is damaged.
    """
    return {name: tensor for file in _weight_files(folder) for name, tensor in _list(file).items()}


def _weight_files(folder: Path) -> list[Path]:
    """All ``.safetensors`` files that the index names, or the single file."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        reason = f"only {pickled[0]}, a pickle, which can run code when read" if pickled else "no weights"
        raise PeftJaxError(f"{folder} has {reason}: give a folder with model.safetensors (transformers' "
                           "save_pretrained writes one).")
    try:
        named = sorted({folder / Path(file).name for file in files.read_json(index)["weight_map"].values()})
    except (KeyError, AttributeError, TypeError) as error:
        raise PeftJaxError(f"{index} has no weight_map: fetch it again.") from error
    absent = [file.name for file in named if not file.is_file()]
    if absent:
        raise PeftJaxError(f"{folder} lacks {errors.some(absent)}, which {index.name} names: fetch the missing files.")
    return named


class Tensor(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        from safetensors import safe_open

        # Opened for one tensor only: while a file stays mapped, what was read of it counts as this process's memory.
        with safe_open(self.file, framework="np") as opened:
            return opened.get_tensor(self.name)


def _list(file: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        return {name: Tensor(file, name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}  # noqa: SIM118


def read_all(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one file. Raises ``PeftJaxError`` for a damaged one, and for types that numpy does not have."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise PeftJaxError(f"{path} is damaged: {error}. Fetch it again.") from error
    except (AttributeError, KeyError, TypeError) as error:  # of safetensors, for a type such as float8
        raise PeftJaxError(f"{path} has tensors of a type that cannot be read ({error}): save it as float32, float16 "
                           "or bfloat16.") from error
