"""Files and folders that are never half there: written aside, brought to the disk, then renamed; JSON objects read."""

import contextlib
import glob
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_jax.core.json_shape import short
from peft_jax.errors import PeftJaxError, root_cause


def write(path: Path, data: str | bytes) -> None:
    """Text (UTF-8) or bytes: a reader finds the old file or the new one, a crash leaves at most ``path.tmp`` behind.

    Raises ``OSError`` where the folder is missing or full.
    """
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)  # whatever it is: a pipe would wait for its reader
    aside.write_bytes(data.encode() if isinstance(data, str) else data)
    flush(aside)
    os.replace(aside, path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk: a rename may be there before the bytes are, and after a
    power failure the new name would be of an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # a file system that cannot: it keeps what it can
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def flush_all(folder: Path) -> None:
    """:func:`flush` of every file and folder in ``folder``, and of itself."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir() or path.is_file():
            flush(path)


@contextlib.contextmanager
def locked(path: Path, folder: Path, what: str) -> Iterator[None]:
    """While entered, no other process is at ``what`` in the workdir ``folder``; the lock ends with the process, however
    that ends.

    Beside the lock file ``path`` stands ``path.json``: which process has it, on which machine, since when.

    Raises ``PeftJaxError`` where another one is.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    owner, lock = path.with_name(f"{path.name}.json"), FileLock(path, timeout=0)
    for one in (path, owner):
        if os.path.lexists(one):
            regular_file(one, f"the lock of {what}", mend="remove it")
    try:
        lock.acquire()
        write(owner, json.dumps({"process": os.getpid(), "machine": socket.gethostname(),
                                 "since": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
    except Timeout as error:
        raise PeftJaxError(f"{folder}: another process is at {what} now{_whose(owner)}; wait for it, or choose another "
                           "--workdir") from error
    except (OSError, NotImplementedError):  # a file system that knows no locks
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            owner.unlink(missing_ok=True)
        lock.release()


def _whose(owner: Path) -> str:
    try:
        said = json.loads(owner.read_text(encoding="utf-8"))
        return f", number {said['process']} on {said['machine']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is about to say so, or has just gone
        return ""


DAY = 86400.0  # seconds


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
        sweep(folder, older=DAY)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
            scratch, aside = Path(made, "new"), Path(made, "old")
            scratch.mkdir()
            aside.mkdir()
            yield scratch
            for file in scratch.glob("*.safetensors"):  # which safetensors makes private
                shutil.copymode(scratch / last, file)
            flush_all(scratch)
            _move(scratch, folder, aside, last, stale)
            flush(folder)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or error
        raise PeftJaxError(f"the {what} cannot be written to {folder}: {said}.") from error


def sweep(folder: Path, older: float = 0) -> None:
    """Remove the scratch folders beside ``folder`` that killed processes left, if they are ``older`` (seconds): another
    process may be writing one."""
    for left in folder.parent.glob(f".{glob.escape(folder.name)}-????????"):
        with contextlib.suppress(OSError):  # it has just gone, or is somebody else's
            ours = {path.name for path in left.iterdir()} <= {"new", "old", "whole", "archive", "requirements.txt"}
            if ours and time.time() - left.stat().st_mtime >= older:
                shutil.rmtree(left)


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


def expanded(path: str | os.PathLike) -> Path:
    """The path, with ``~`` as a user's home. Of a user that is unknown it stays, where ``Path.expanduser`` raises."""
    return Path(os.path.expanduser(path))


KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
         (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def regular_file(path: str | Path, what: str, most: int | None = None,
                 mend: str = "put the file itself there") -> Path:
    """The path, if a plain file, or a link to one, lies there: to open a pipe or a device may wait for ever, or never
    end. Nothing is opened.

    Args:
      what: the file is for its reader, such as "the model's config", for the error.
      most: bytes that it may have.
      mend: what to do about something else in its place, the end of the error.
    Raises:
      PeftJaxError: nothing is there, something else is, it is larger, or it cannot be looked at.
    """
    try:
        mode, size = (stated := Path(path).stat()).st_mode, stated.st_size
    except FileNotFoundError as error:
        raise PeftJaxError(f"{what}: there is no file {path}.") from error
    except (OSError, ValueError) as error:  # no access, too long a name, links in a circle; a NUL in it
        raise PeftJaxError(f"{what}: {str(path)[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}."
                           ) from error
    if not stat.S_ISREG(mode):
        kind = next((words for is_kind, words in KINDS if is_kind(mode)), "no file")
        raise PeftJaxError(f"{what}: {path} is {kind}, not a file: {mend}.")
    if most is not None and size > most:
        raise PeftJaxError(f"{what}: {path} has {size:,} bytes, and {most:,} is the most that is read of such a file: "
                           f"{mend}.")
    return Path(path)


@contextlib.contextmanager
def reading(path: str | Path, what: str, mend: str = "fetch it again") -> Iterator[None]:
    """While entered, whatever a reader raises becomes its one line, which names the file ``path`` and the cause.

    For the reading alone: what is read is checked before, or afterwards, and code that works with it is not inside.

    >>> with reading("config.json", "a config"):
    ...     {}["vocab_size"]
    Traceback (most recent call last):
    ...
    peft_jax.errors.PeftJaxError: config.json cannot be read as a config (KeyError: 'vocab_size'): fetch it again.
    """
    try:
        yield
    except (PeftJaxError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library written in Rust is no Exception
        raise PeftJaxError(f"{path} cannot be read as {what} ({root_cause(error)}): {mend}.") from error


MOST_JSON = 64 << 20  # bytes; the largest such file is the tokenizer of a large vocabulary, a third of it


def read_json(path: Path, *needed: str, mend: str = "fetch it again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises ``PeftJaxError``, which ends in ``mend``, where it is damaged, no object, or lacks a ``needed`` key; and
    where it is no file, or a larger one than any.
    """
    if os.path.lexists(path) and not os.path.isdir(path):  # what opening these says is clear
        regular_file(path, "JSON is read from files", MOST_JSON, mend)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise PeftJaxError(f"{path} is not readable as JSON ({error}): {mend}.") from error
    if not isinstance(value, dict):
        raise PeftJaxError(f"{path} holds {short(value)}, not a JSON object: {mend}.")
    missing = [key for key in needed if key not in value]
    if missing:
        raise PeftJaxError(f"{path} lacks {', '.join(missing)}: {mend}.")
    return value


def parse_json(text: str, **parsers: Any) -> Any:
    """What a text says as JSON, by ``parsers`` as of ``json.loads``.

    Raises ``ValueError`` where it is none, or gives a key two values.

    >>> parse_json('{"r": 8, "r": 9}')
    Traceback (most recent call last):
    ...
    ValueError: the key 'r' stands there twice
    """
    return json.loads(text, object_pairs_hook=_once_each, **parsers)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.100} stands there twice")
    return value


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
