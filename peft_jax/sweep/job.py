"""All cells of a sweep, each in a process of its own, and what they say together. No device is touched here."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peft_jax.comparison import record, table
from peft_jax.comparison.report import report
from peft_jax.errors import PeftJaxError
from peft_jax.train import workdir

PROGRAM = Path(__file__).parents[2] / "run.py"
RESULTS, LOGS = "results", "logs"
ASKED = ("model", "method", "task", "data", "optim", "eval", "measure", "seed")  # what a finished cell is finished for
STOPPED = (130, 143)  # exit codes of a run that was told to stop


def run(command, argv: Sequence[str]) -> int:
    """Run every cell that is not finished yet, then tabulate and plot all; ``argv`` is the command line.

    A cell that fails does not stop the rest: its record and its log say why, and the exit code is then 2. Raises
    ``PeftJaxError`` where the workdir holds cells of other settings.
    """
    folder, failed = Path(command.workdir), 0
    if command.mode == "report":
        return tell(folder, argv)
    if command.mode == "cells":
        return show(folder, command.cells)
    workdir.check_writable(folder)
    if not command.overwrite:
        for cell in command.cells:
            check_same(folder, cell)
    width = len(str(len(command.cells)))
    for index, cell in enumerate(command.cells):
        head = f"[{index + 1:>{width}}/{len(command.cells)}] {cell.name}"
        if finished(folder, cell) and not command.overwrite:
            print(f"{head}: finished before", flush=True)
            continue
        began = time.perf_counter()
        code, last = _run(folder, cell, index, argv)
        seconds = time.perf_counter() - began
        if code in STOPPED:
            print(f"{head}: stopped; the same command goes on from there", flush=True)
            return code
        failed += bool(code)
        print(f"{head}: {f'failed: {last}' if code else said(folder, cell, command)}, {seconds:.0f} s", flush=True)
    return max(tell(folder, argv), 2 if failed else 0)


def show(folder: Path, cells: Sequence) -> int:
    """Print the cells with their numbers, and which are finished."""
    for index, cell in enumerate(cells):
        how = f"the best of {len(cell.best_of)} finished ones, then measured" if cell.best_of else ""
        how = ", ".join(filter(None, (how, "finished" if finished(folder, cell) else "")))
        print(f"{index:>4}  {cell.name}{f'  ({how})' if how else ''}")
    return 0


def tell(folder: Path, argv: Sequence[str]) -> int:
    """Print the table of all records there are, and write it, the plots and the page."""
    records = record.read(folder / RESULTS)
    written = report(folder, records, shlex.join(["python", "run.py", *argv]))
    names = [path.name for path in written if path.parent == folder]
    print(f"\n{table.terminal(records)}\n\nwritten to {folder}: {', '.join(names)}, plots/")
    return 0


def record_of(folder: Path, cell) -> Path:
    """Where the record of a cell is, or will be."""
    return record.path_of(folder / RESULTS, cell.experiment)


def finished(folder: Path, cell) -> bool:
    """Whether the cell has been run to its end."""
    path = record_of(folder, cell)
    return path.exists() and workdir.read_json(path, "train_info")["train_info"].get("status") == "success"


def check_same(folder: Path, cell) -> None:
    """Raise ``PeftJaxError``, naming the keys, where the cell was run with other settings."""
    path = record_of(folder, cell)
    asked = workdir.read_json(path).get("peft_jax", {}).get("asked") if path.exists() else None
    if asked and (changes := workdir.differences(asked, cell.config.to_dict(), ASKED)):
        raise PeftJaxError(f"{folder} holds {cell.name} with other settings: {'; '.join(changes)}. Choose another "
                           "--workdir, or --overwrite to run all again")


def _run(folder: Path, cell, index: int, argv: Sequence[str]) -> tuple[int, str]:
    """(exit code, last line) of the cell in a process of its own, which writes into a log."""
    log = folder / LOGS / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(PROGRAM), *argv, f"--sweep_index={index}"]
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        usual = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # it saves, and says so by its exit code
        try:
            code = process.wait()
        except KeyboardInterrupt:  # which reaches both
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, usual)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return code, lines[-1].removeprefix("error: ") if lines else f"exit code {code}, see {log}"


def said(folder: Path, cell, command) -> str:
    """A finished cell's metric."""
    found, metric = workdir.read_json(record_of(folder, cell), "peft_jax")["peft_jax"], command.config.sweep.metric
    on = "test" if "test" in found else "validation"
    return f"{metric} {found[on][metric]:.3f} on {on}" if found[on].get(metric) is not None else "finished"
