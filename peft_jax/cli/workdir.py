"""What a run keeps in its folder, and whether the folder fits the command that is about to use it.

    config.json          the configuration, written when training starts
    fingerprint.json     of the training examples and the base's weights; a resumed run must have the same
    checkpoints/         see checkpoint.py
    metrics.jsonl        one line per logged step
    tensorboard/
    profile/             a trace of some steps, with --profile
    before.json          the metrics before training
    adapter/             in Hugging Face peft's format, written when training is done
    model/               the whole model instead, of a method that has no adapter file
    results.json         written last: its presence means that the run is finished
    merged/, eval.json   by --mode=merge (a whole model; --mode=export is the same) and --mode=eval
    manifest.json        which of these names are the run's own: nothing else is ever replaced or removed
    lock                 held by the process that trains
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_jax.core import files, run_files, settings
from peft_jax.errors import PeftJaxError
from peft_jax.parallel import processes

WRITTEN = (
    "results.json", "config.json", "checkpoints", "metrics.jsonl", "tensorboard", "before.json", "adapter", "model",
    "merged", "eval.json", "profile", "measured.json", "fingerprint.json",
)  # fmt: skip
FOLDERS = ("checkpoints", "tensorboard", "adapter", "model", "merged", "profile")  # of WRITTEN; others are files
KEPT = tuple(name for name in WRITTEN if name != "merged")  # which merge does not write
MATTERS = ("seed", "model", "method", "task", "data", "optim")  # sections that a resumed run may not change
ADAPTER_MATTERS = ("model.source",)  # what its adapter needs; the method is in the adapter's own files
MANIFEST, LOCK = "manifest.json", "lock"


def check_writable(folder: Path, leave: bool = False) -> None:
    """Raise ``PeftJaxError`` where ``folder`` cannot be made or written.

    Leaves nothing behind, or, with ``leave``, the folder: of several processes that look at once, one would take it
    away under another.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not os.path.exists(path)]
    try:  # not os.access, which answers root "yes" for folders that nobody can write, such as /proc
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for path in () if leave else missing:
            with contextlib.suppress(OSError):  # never made
                path.rmdir()


def check_output(output: Path, folder: Path, source: str) -> None:
    """Raise ``PeftJaxError`` where a model written to ``output`` would overwrite what is not its own: the base model
    ``source``, the run in ``folder``, another one, or what either keeps."""
    base, place = files.expanded(source), output.resolve()
    if output.exists() and os.path.exists(base) and output.samefile(base):
        raise PeftJaxError(f"--output={output} is the base model itself: choose another folder")
    for run in (place, *place.parents):
        inside = place.relative_to(run).parts
        if (not inside or inside[0] in KEPT) and (run == folder.resolve() or _is_run(run)):
            what = f"'{inside[0]}' of the run in {run}" if inside else "the folder of a run"
            raise PeftJaxError(f"--output={output} is {what}, which the model would overwrite: choose another folder, "
                               f"such as {run / 'merged'}")


def _is_run(folder: Path) -> bool:
    """Whether the folder's ``config.json`` is a run's configuration, and not a model's."""
    return _has_keys(folder / "config.json", MATTERS)


def _has_keys(path: Path, names: tuple[str, ...]) -> bool:
    try:
        return files.read_json(path).keys() >= set(names)
    except PeftJaxError:
        return False


def _unwritable(folder: Path, error: OSError) -> PeftJaxError:
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        return PeftJaxError(f"workdir {folder}: {existing} is a file, not a folder; choose another with --workdir")
    return PeftJaxError(f"workdir {folder} cannot be written: {error.strerror}; choose another with --workdir")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While entered, no other process trains in ``folder``, which is made for it and goes if nothing came into it.

    Raises ``PeftJaxError``, in all processes of a run, where another run is at it.
    """
    made = not folder.exists()
    with contextlib.ExitStack() as stack:
        fault = _entered(stack, files.locked(folder / LOCK, folder, "this run")) if processes.first() else None
        if processes.agreed(fault is not None):
            raise fault or PeftJaxError(f"{folder}: another process is at this run now")
        try:
            yield
        finally:
            if made and processes.first() and {path.name for path in folder.glob("*")} <= {LOCK, f"{LOCK}.json"}:
                files.remove(folder)


def _entered(stack: contextlib.ExitStack, lock: contextlib.AbstractContextManager) -> PeftJaxError | None:
    try:
        stack.enter_context(lock)
    except PeftJaxError as error:
        return error
    return None


def own_names(folder: Path) -> set[str]:
    """The names in ``folder`` that a run wrote. One from before there were manifests is known by its config.json, a
    measured base, which has none, by its measured.json."""
    path = folder / MANIFEST
    if path.exists():
        return set(read_json(path, "written", mend="remove it")["written"])
    return set(WRITTEN) if _is_run(folder) or _has_keys(folder / "measured.json", ("asked", "test")) else set()


def check_own(folder: Path, *names: str) -> set[str]:
    """The names as of :func:`own_names`; raises ``PeftJaxError`` where ``folder`` has one of ``names`` that is not."""
    own = own_names(folder)
    if foreign := [name for name in names if name not in own and os.path.lexists(folder / name)]:
        raise PeftJaxError(f"{folder} holds {foreign[0]!r}, which no run wrote and which this one would replace: "
                           "choose another --workdir, or move it away")
    return own


def check_kinds(folder: Path) -> None:
    """Raise ``PeftJaxError`` where a name that a run is to read or write is a file instead of a folder, or no file."""
    for name in (name for name in WRITTEN if os.path.lexists(folder / name)):
        if name not in FOLDERS:
            files.regular_file(folder / name, "a file of a run", mend=run_files.MEND)
        elif not (folder / name).is_dir():
            raise PeftJaxError(f"{folder / name} is no folder, as a run's is: {run_files.MEND}.")


def claim(folder: Path, *names: str) -> None:
    """Make ``names`` the run's own, before they are written; raises ``PeftJaxError`` as :func:`check_own`."""
    own = check_own(folder, *names)
    if not own.issuperset(names):
        write_json(folder / MANIFEST, {"written": sorted({*own, *names})})


def check_config(folder: Path, config: dict[str, Any], matters: tuple[str, ...] = MATTERS) -> None:
    """Raise ``PeftJaxError``, naming the keys, where the run in ``folder`` differs in these sections or keys, and where
    what is there is no run's."""
    if not (folder / "config.json").exists():
        return
    check_own(folder, "config.json")
    sections = dict.fromkeys(name.split(".")[0] for name in matters)
    changes = settings.differences(read_json(folder / "config.json", *sections), config, matters)
    if changes:
        raise PeftJaxError(
            f"{folder} holds a run with other settings: {'; '.join(changes)}. Choose another --workdir, or --overwrite "
            "to train again from the start"
        )


def start(folder: Path, config: dict[str, Any], overwrite: bool) -> None:
    """Make the folder, remove an old run's files if told to, and what a killed one left aside, and write
    ``config.json``. For the process that has the lock.

    Raises ``PeftJaxError`` where the folder holds files of these names that no run wrote.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder, *WRITTEN)
        for name in WRITTEN:
            files.sweep(folder / name)
            files.remove(folder / f"{name}.tmp")
            if overwrite:
                files.remove(folder / name)
        write_json(folder / "config.json", config)
    except OSError as error:
        raise _unwritable(folder, error) from error


def bytes_in(folder: Path) -> int:
    """Of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_json(path: Path, value: Any) -> None:
    """Written aside, then renamed: a reader finds the old file or the new one, never half of it."""
    files.write(path, json.dumps(value, indent=1) + "\n")


def write_report(folder: Path, name: str, value: Any) -> None:
    """What a job found, into the workdir, and where that is to the terminal."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim(folder, name)
        write_json(folder / name, value)
    except OSError as error:
        raise _unwritable(folder, error) from error
    print(f"\nwritten: {folder / name}")


def read_json(path: Path, *needed: str, mend: str = run_files.MEND) -> dict[str, Any]:
    """As of :func:`peft_jax.core.run_files.read`, of a file that a run wrote."""
    return run_files.read(path, *needed, mend=mend)
