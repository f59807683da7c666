"""A process that tries inputs, one for each line on its standard input: ``{"surface": ..., "seed": ...}``; on standard
output a line with the outcome. Who starts it may end it at any time."""

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.cases import Outcome, outcome_of
from peft_jax.core.files import remove
from peft_jax.train.memory import peak_of_host


def tried(surface: str, seed: int, base: Any, folder: Path) -> tuple[str, Outcome]:
    """(what was done, outcome) of one input, whose files lie in ``folder``."""
    remove(folder)
    folder.mkdir(parents=True)
    trial = import_module(f"benchmarks.fuzz.surfaces.{surface}").trial(base, Random(seed), folder)
    what_of(folder).write_text(json.dumps(trial.what))  # for whoever ends this process
    return trial.what, outcome_of(trial)


def what_of(folder: Path) -> Path:
    """The file that says what is being tried in ``folder``."""
    return folder.with_suffix(".what")


def prepared(surface: str, place: Path) -> Any:
    """The undamaged input of a surface and what is read of it, made once for all workers where that takes time."""
    return import_module(f"benchmarks.fuzz.surfaces.{surface}").prepare(place)


def main(place: str, number: str) -> None:
    answers, bases = os.fdopen(os.dup(1), "w", buffering=1), {}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what readers print is not asked for
    folder = Path(place) / f"worker-{number}"
    for line in sys.stdin:
        surface, seed = (asked := json.loads(line))["surface"], asked["seed"]
        if surface not in bases:
            bases[surface] = prepared(surface, Path(place))
        if seed is None:  # to be ready is all that is asked
            answers.write("{}\n")
            continue
        what, outcome = tried(surface, seed, bases[surface], folder)
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()  # programs, which no other input has a use for
        memory = peak_of_host()
        answers.write(json.dumps({"what": what, **outcome._asdict(), "memory": memory}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
