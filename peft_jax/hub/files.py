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
      last: the file without which readers find nothing.
      stale: patterns of an older writing's files, removed unless they were written anew.
    Raises:
      PeftJaxError: the folder cannot be written; it is then as it was.
    """
    from safetensors import SafetensorError  # what it raises for a full disk is no OSError

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            scratch, aside = Path(made, "new"), Path(made, "old")
            scratch.mkdir()
            aside.mkdir()
            yield scratch
            for file in scratch.glob("*.safetensors"):  # which safetensors makes private
                shutil.copymode(scratch / last, file)
            _move(scratch, folder, aside, last, stale)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise PeftJaxError(f"the {what} cannot be written to {folder}: {said}.") from error


def _move(scratch: Path, folder: Path, aside: Path, last: str, stale: tuple[str, ...]) -> None:
    """New files into ``folder``, the older writing's out of it; ``last`` leaves first and comes last.

    So in between, where the process may die, there is nothing that a reader takes for whole.
    """
    folder.mkdir(exist_ok=True)
    new = sorted((file.name for file in scratch.iterdir()), key=lambda name: (name == last, name))
    found = [file.name for pattern in stale for file in folder.glob(pattern)]
    old = [name for name in dict.fromkeys((*reversed(new), *found)) if (folder / name).is_file()]
    try:
        for name in old:
            os.replace(folder / name, aside / name)
        for name in new:
            os.replace(scratch / name, folder / name)
    except BaseException:
        _restore(scratch, folder, aside, new, old)
        raise


def _restore(scratch: Path, folder: Path, aside: Path, new: list[str], old: list[str]) -> None:
    for name in reversed(new):
        if not (scratch / name).exists() and (folder / name).exists():
            os.replace(folder / name, scratch / name)
    for name in reversed(old):
        if (aside / name).exists():
            os.replace(aside / name, folder / name)


def faults_text(faults: Mapping[str, Collection[str]]) -> str:
    """``"2 missing: a, b; 1 unexpected: c"``, "" where nothing is at fault."""
    return "; ".join(f"{len(found)} {kind}: {some(sorted(found))}" for kind, found in faults.items() if found)


def some(items: list[str], most: int = 5) -> str:
    """The first few of a list and how many more there are."""
    return ", ".join(items[:most]) + (f", and {len(items) - most} more" if len(items) > most else "")
