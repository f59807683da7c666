"""All cells of a sweep, each in a process of its own, and what they say together. No device is touched here."""

import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from peft_jax.cli import workdir
from peft_jax.core import files
from peft_jax.errors import PeftJaxError
from peft_jax.studies.comparison import record, table
from peft_jax.studies.comparison.report import report
from peft_jax.studies.sweeps import results
from peft_jax.studies.sweeps.results import LOGS, RESULTS

PROGRAM = Path(__file__).parents[2] / "run.py"
COLUMNS = 79  # of a line for people
STOPPED = (130, 143)  # exit codes of a run that was told to stop


def run(command, argv: Sequence[str]) -> int:
    """Run every cell that is not finished yet, then tabulate and plot all; ``argv`` is the command line.

    A cell that fails does not stop the rest: its record and its log say why, and the exit code is then 2. Raises
    ``PeftJaxError`` where the workdir holds cells of other settings, or another process is at the same sweep.
    """
    folder = Path(command.workdir)
    if command.mode == "report":
        return tell(folder, argv)
    if command.mode == "cells":
        return show(folder, command)
    workdir.check_writable(folder)
    with results.locked(folder, "sweep"):
        if command.overwrite:
            results.forget(folder, command)
        for cell in command.cells:
            results.check_same(folder, command, cell)
        return _all(folder, command, argv)


def _all(folder: Path, command, argv: Sequence[str]) -> int:
    width, failed = len(str(len(command.cells))), 0
    for index, cell in enumerate(command.cells):
        head = f"[{index + 1:>{width}}/{len(command.cells)}] {cell.name}"
        if results.finished(folder, command, cell):
            print(f"{head}: finished before", flush=True)
            continue
        began = time.perf_counter()
        code, last = _run(folder, cell, index, argv)
        seconds = time.perf_counter() - began
        if code in STOPPED:
            again = "the same command without --overwrite" if command.overwrite else "the same command"
            print(f"{head}: stopped; {again} goes on from there", flush=True)
            return code
        failed += bool(code)
        line = f"{head}: {f'failed: {last}' if code else said(folder, cell)}, {seconds:.0f} s"
        print(line if code else textwrap.fill(line, COLUMNS, subsequent_indent=" " * len(head[:head.index("]") + 2]),
                                              break_on_hyphens=False), flush=True)
    return max(tell(folder, argv), 2 if failed else 0)


def show(folder: Path, command) -> int:
    """Print the cells with their numbers, and which are finished."""
    for index, cell in enumerate(command.cells):
        how = f"the best of {len(cell.best_of)}, measured" if cell.best_of else ""
        how = ", ".join(filter(None, (how, "finished" if results.finished(folder, command, cell) else "")))
        print(f"{index:>4}  {cell.name}{f'  ({how})' if how else ''}")
    return 0


def tell(folder: Path, argv: Sequence[str]) -> int:
    """Print the table of all records there are, and write it, the plots and the page."""
    records = record.read(folder / RESULTS)
    print(f"\n{table.terminal(records)}\n", flush=True)
    try:
        written = report(folder, records, shlex.join(["python", "run.py", *argv]))
    except OSError as error:
        raise PeftJaxError(f"the table and the plots cannot be written to {folder}: {error.strerror}") from error
    names = [path.name for path in written if path.parent == folder]
    print(f"written to {folder}: {', '.join(names)}, plots/")
    return 0


def _run(folder: Path, cell, index: int, argv: Sequence[str]) -> tuple[int, str]:
    """(exit code, last line) of the cell in a process of its own, which writes into a log.

    The code is 130 or 143 where this process was told to stop, whatever the other one made of it; a process that a
    signal ended has the code that a shell gives it. Where it leaves no record, it gets one here.
    """
    log, place = folder / LOGS / f"{cell.name}.log", results.record_of(folder, cell)
    log.parent.mkdir(parents=True, exist_ok=True)
    files.remove(place)  # of a start that failed: what ends this one must not be told by it
    command = [sys.executable, str(PROGRAM), *argv, "--nooverwrite", f"--sweep_index={index}"]
    code = _waited(command, log)
    last, code = _last(log, code), 128 - code if code < 0 else code
    if code and code not in STOPPED and not place.exists():
        record.write(folder / RESULTS, record.failed(cell.experiment, last))
    return code, last


def _waited(command: Sequence[str], log: Path) -> int:
    told = []
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

        def stop(number, frame):
            told.append(128 + number)
            process.terminate()  # it saves, if it trains

        usual = signal.signal(signal.SIGTERM, stop)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # which reaches both
            told.append(130)
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, usual)
    return told[0] if told else code


def _last(log: Path, code: int) -> str:
    if code < 0:
        return f"ended by signal {-code} ({signal.strsignal(-code)}), see {log}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}, see {log}"


def said(folder: Path, cell) -> str:
    """A finished cell's metric."""
    run = results.cell_run(folder, cell)
    if run is None or "value" not in run.values:
        return "finished"
    return f"{run.metric} {run.values['value']:.3f} on {run.measured_on}"
