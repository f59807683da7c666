"""One cell of a sweep, run in this process: train, measure, and write down what came of it."""

import datetime
import time
import traceback
from pathlib import Path
from typing import Any

from peft_jax.comparison import record
from peft_jax.errors import PeftJaxError
from peft_jax.sweep.compose import Outcome, compose
from peft_jax.sweep.job import RESULTS, record_of
from peft_jax.train import measure, workdir
from peft_jax.train.training import train


def run(command) -> int:
    """Train and measure the cell ``command.sweep_index``, each where it is not done yet, and write its record.

    Where it fails, the record says why, and the error is raised. Returns the exit code of training.
    """
    folder, cell = Path(command.workdir), command.cells[command.sweep_index]
    began, when = time.perf_counter(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    whole = cell.having(chosen(folder, command, cell))
    place = folder / "runs" / whole.name
    own = command._replace(config=whole.config, workdir=str(place), cells=[], sweep_index=None)

    def write(error: str = "") -> None:
        outcome = Outcome(when, time.perf_counter() - began, error)
        record.write(folder / RESULTS, compose(folder, cell, whole, command.config.sweep.metric, outcome))

    try:
        if code := 0 if whole.config.measure.of == "base" else train(own):
            return code  # told to stop: the same command goes on from there
        if cell.measure:
            measure.job(own)
    except Exception as error:
        write(str(error) if isinstance(error, PeftJaxError) else traceback.format_exc(limit=-2))
        raise
    write()
    workdir.remove(place / "checkpoints")  # three times the weights in full fine-tuning; a finished run needs none
    return 0


def chosen(folder: Path, command, cell) -> dict[str, Any]:
    """The settings of the best, on validation data, of the cells that ``cell`` chooses from; {} where it does not."""
    metric, found = command.config.sweep.metric, []
    for other in (one for one in command.cells if one.name in cell.best_of):
        path = record_of(folder, other)
        done = workdir.read_json(path, "peft_jax", "train_info") if path.exists() else None
        if done and done["train_info"]["status"] == "success":
            found.append((_value(done, metric), other.settings))
    if cell.best_of and not found:
        raise PeftJaxError(f"{cell.name} takes the best of {', '.join(cell.best_of)}, none of which is finished: run "
                           "these cells first")
    return max(found, key=lambda one: one[0])[1] if found else {}


def _value(done: dict[str, Any], metric: str) -> float:
    metrics = done["peft_jax"]["validation"]
    if metrics.get(metric) is None:
        raise PeftJaxError(f"--config.sweep.metric={metric}: the runs have {', '.join(metrics)}; of what should be "
                           "small write a minus in front, -loss")
    return metrics[metric]
