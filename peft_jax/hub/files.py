"""Folders that are never half-written, and what does not fit in those that are read."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from peft_jax.errors import PeftJaxError


@contextlib.contextmanager
def written_aside(folder: Path, what: str, last: str, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """A scratch folder whose files move into ``folder`` when the block ends well; until then ``folder`` is untouched.

    Args:
      folder: made where missing; other files in it stay.
      what: what is written, for the error.
      last: the file that moves last, without which readers find nothing.
      stale: patterns of an older writing's files, removed unless they were written anew.
    Raises:
      PeftJaxError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            scratch = Path(made)
            yield scratch
            for file in scratch.glob("*.safetensors"):  # which safetensors makes private
                shutil.copymode(scratch / last, file)
            _move(scratch, folder, last, stale)
    except OSError as error:
        raise PeftJaxError(f"the {what} cannot be written to {folder}: {error.strerror or error}.") from error


def _move(scratch: Path, folder: Path, last: str, stale: tuple[str, ...]) -> None:
    folder.mkdir(exist_ok=True)
    new = sorted((file.name for file in scratch.iterdir()), key=lambda name: (name == last, name))
    for name in new:
        os.replace(scratch / name, folder / name)
    for old in [file for pattern in stale for file in folder.glob(pattern)]:
        if old.name not in new:
            old.unlink(missing_ok=True)


def faults_text(faults: Mapping[str, Collection[str]]) -> str:
    """``"2 missing: a, b; 1 unexpected: c"``, "" where nothing is at fault."""
    return "; ".join(f"{len(found)} {kind}: {some(sorted(found))}" for kind, found in faults.items() if found)


def some(items: list[str], most: int = 5) -> str:
    """The first few of a list and how many more there are."""
    return ", ".join(items[:most]) + (f", and {len(items) - most} more" if len(items) > most else "")
