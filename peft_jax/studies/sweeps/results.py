"""What the workdir of a sweep holds of its cells: which are finished, and what others choose by them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft_jax.core import files, settings
from peft_jax.errors import PeftJaxError
from peft_jax.studies.comparison import record
from peft_jax.studies.comparison.runs import ASKED, Run, nested, number, run_of

RESULTS, LOGS = "results", "logs"


def locked(folder: Path, name: str) -> AbstractContextManager[None]:
    """While entered, no other process is at what ``name`` names; raises ``PeftJaxError`` where another one is."""
    return files.locked(folder / LOGS / f"{name}.lock", folder, name)


def record_of(folder: Path, cell) -> Path:
    """Where the record of a cell is, or will be."""
    return record.path_of(folder / RESULTS, cell.experiment)


def cell_run(folder: Path, cell) -> Run | None:
    """What the cell's record tells, a damaged one of a failed run (see ``record.read``); None where there is none."""
    path = record_of(folder, cell)
    return run_of(record.read_one(path)) if path.exists() else None


def finished(folder: Path, command, cell) -> bool:
    """Whether the cell has been run to its end and would come out the same now: nothing that it chooses from has become
    better since, nor has the base model beside it been measured."""
    run = cell_run(folder, cell)
    if run is None or not run.finished:
        return False
    if options := candidates(folder, command, cell):
        now = settings.plain(cell.having(_best(options)).settings)
        if nested(run.record, "peft_jax", "cell", "settings") != now:
            return False
    base = next((other for other in command.cells if other.config.measure.of == "base"), None)
    lacks_base = cell.measure and base not in (None, cell) and not nested(run.record, "peft_jax", "base_test")
    return not (lacks_base and (base_run := cell_run(folder, base)) and base_run.finished)


def candidates(folder: Path, command, cell) -> list[tuple[float, dict[str, Any]]]:
    """(metric on validation data, settings) of the finished cells that ``cell`` chooses from, in the sweep's order.

    A run whose metric is not finite is none of them.
    """
    metric, options = command.config.sweep.metric, []
    for other in (one for one in command.cells if one.name in cell.best_of):
        run = cell_run(folder, other)
        value = number(run.record, "peft_jax", "validation", metric) if run and run.finished else None
        if value is not None:
            options.append((value, other.settings))
    return options


def chosen(folder: Path, command, cell) -> dict[str, Any]:
    """The settings of the best, on validation data, of the cells that ``cell`` chooses from; {} where it does not."""
    options = candidates(folder, command, cell)
    if cell.best_of and not options:
        raise PeftJaxError(f"{cell.name} takes the best of {', '.join(cell.best_of)}, none of which is finished: run "
                           "these cells first")
    return _best(options) if options else {}


def _best(options: Sequence[tuple[float, dict[str, Any]]]) -> dict[str, Any]:
    """Of equals the one that comes first."""
    return max(options, key=lambda option: option[0])[1]


def check_same(folder: Path, command, cell) -> None:
    """Raise ``PeftJaxError``, naming the keys, where the finished cell was run with other settings."""
    run = cell_run(folder, cell)
    if run is None or not run.finished or not run.asked:
        return
    wanted = {**cell.config.to_dict(), "metric": command.config.sweep.metric}
    sections = [name for name in ("seed", "metric", *ASKED) if name != "measure" or cell.measure]
    asked = {**nested(run.record, "peft_jax", "asked"), "metric": run.metric}
    if changes := settings.differences(asked, wanted, sections):
        raise PeftJaxError(f"{folder} holds {cell.name} with other settings: {'; '.join(changes)}. Choose another "
                           "--workdir, or --overwrite to run all again")


def forget(folder: Path, command) -> None:
    """Remove the records and the runs of the cells, also those of whatever a cell may choose."""
    chosen_settings = {one.name: one.settings for one in command.cells}
    for cell in command.cells:
        files.remove(record_of(folder, cell))
        for one in (cell, *(cell.having(chosen_settings[name]) for name in cell.best_of)):
            files.remove(folder / "runs" / one.name)
