"""One cell of a sweep, run in this process: train, measure, and write down what came of it."""

import datetime
import time
import traceback
from pathlib import Path

from peft_jax.cli import measure, train, workdir
from peft_jax.cli.settle_task import settled
from peft_jax.core import files
from peft_jax.errors import PeftJaxError
from peft_jax.studies.comparison import record
from peft_jax.studies.sweeps import results
from peft_jax.studies.sweeps.run_record import Outcome, compose


def run(command) -> int:
    """Train and measure the cell ``command.sweep_index``, each where it is not done yet, and write its record.

    Where it fails, the record says why, and the error is raised. Returns the exit code of training. Raises
    ``PeftJaxError`` where the workdir holds cells of other settings, or another process is at this cell.
    """
    folder, cell = Path(command.workdir), command.cells[command.sweep_index]
    if not command.overwrite:
        for one in command.cells:
            results.check_same(folder, command, one)
        if results.finished(folder, command, cell):
            print(f"{folder} holds {cell.name}, finished; --overwrite runs it again")
            return 0
    whole = cell.having(results.chosen(folder, command, cell))
    workdir.check_writable(folder / "runs" / whole.name, leave=True)
    with results.locked(folder, whole.name):
        return _run(folder, command, cell, whole)


def _run(folder: Path, command, cell, whole) -> int:
    """``whole`` is the cell with the settings that it chose."""
    start, when = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    place = folder / "runs" / whole.name
    files.remove(results.record_of(folder, cell))  # of a start that failed, or was not the last word
    own = settled(command._replace(config=whole.config, workdir=str(place), cells=[], sweep_index=None))

    def write(error: str = "") -> None:
        outcome = Outcome(when, time.perf_counter() - start, error)
        record.write(folder / results.RESULTS, compose(folder, cell, whole, command.config.sweep.metric, outcome))

    try:
        if not command.overwrite:  # what evaluated otherwise when it ended is another result
            workdir.check_config(place, own.config.to_dict(), (*workdir.MATTERS, "eval"))
        if code := 0 if whole.config.measure.of == "base" else train.job(own):
            return code  # told to stop: the same command goes on from there
        if cell.measure:
            measure.job(own)
    except Exception as error:
        write(str(error) if isinstance(error, PeftJaxError) else traceback.format_exc(limit=-2))
        raise
    write()
    files.remove(place / "checkpoints")  # three times the weights in full fine-tuning; a finished run needs none
    return 0
