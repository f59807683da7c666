"""Runs that differ in their seed alone as one row: mean, sample standard deviation, n."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from peft_jax.studies.comparison.runs import Run


class Spread(NamedTuple):
    """Of the runs that have the number. std: the sample standard deviation, None of a single run."""

    mean: float
    std: float | None
    n: int


class Row(NamedTuple):
    """name: the label, with what tells it from other rows of that label. values: as a run's, over the seeds.
    measured_on: "test" where any run has it, else "validation"; ``values["value"]``, ``["loss"]`` and ``["general"]``
    are of such runs only."""

    name: str
    label: str
    axes: dict[str, Any]
    metric: str
    measured_on: str
    model: str
    budget: str
    runs: list[Run]
    values: dict[str, Spread]


def rows(runs: Iterable[Run]) -> list[Row]:
    """One row for each kind of finished run, in the order of :func:`grouped`.

    Where a learning rate was chosen for a label, only the chosen runs count. Runs of the same label that differ in
    another setting than the seed, varied or not, their model, budget or metric never share a row.
    """
    return grouped(run for run in chosen_of(list(runs)) if run.finished)


def failures(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if not run.finished]


def chosen_of(runs: Sequence[Run]) -> list[Run]:
    """Without the runs that lost the choice of a learning rate."""
    labels = {(run.label, run.model) for run in runs if run.chosen}
    return [run for run in runs if run.chosen or (run.label, run.model) not in labels]


def grouped(runs: Iterable[Run]) -> list[Row]:
    """Rows of runs that share all but the seed; named apart, the label with the best metric first; of a label by the
    numbers that were varied, then best first."""
    runs = list(runs)
    same = [str((run.label, run.variety, run.model, run.budget, run.metric, run.asked)) for run in runs]
    groups = list(pd.Series(runs, dtype=object).groupby(same, sort=False).agg(list))
    unsorted = [_row(name, group) for name, group in zip(_names(groups), groups, strict=True)]
    order = list(dict.fromkeys((row.metric, row.model, row.budget) for row in unsorted))
    best: dict[str, float] = {}
    for row in unsorted:
        best[row.label] = max(_best(row), best.get(row.label, float("-inf")))
    return sorted(unsorted, key=lambda row: (order.index((row.metric, row.model, row.budget)), -best[row.label],
                                             row.label, _numbers(row.axes), -_best(row)))


def _numbers(axes: dict[str, Any]) -> tuple[float, ...]:
    """The settings that are numbers, to sort by.

    >>> _numbers({"method.r": 8, "method.init": "pissa", "method.bias": True})
    (8,)
    """
    return tuple(value for value in axes.values() if isinstance(value, int | float) and not isinstance(value, bool))


def _best(row: Row) -> float:
    return row.values["value"].mean if "value" in row.values else float("-inf")


def _row(name: str, runs: list[Run]) -> Row:
    on = next((on for on in ("test", "validation") if any(on in run.values for run in runs)), "")
    keys = dict.fromkeys(key for run in runs for key in run.values if key != "value")
    values = {key: spread([run.values[key] for run in runs if key in run.values]) for key in keys}
    one = runs[0]
    row = Row(name=name, label=one.label, axes=one.axes, metric=one.metric, measured_on=on, model=one.model,
              budget=one.budget, runs=runs, values=values)  # fmt: skip
    return measured_on(on, row)


def measured_on(on: str, row: Row) -> Row:
    """``row`` with the numbers of that part, "test" or "validation", as those that count."""
    counts = {"value": on, "loss": f"{on}.loss", "general": f"{on}.general"}
    values = {key: value for key, value in row.values.items() if key not in counts}
    values |= {key: row.values[source] for key, source in counts.items() if source in row.values}
    return row._replace(measured_on=on, values=values)


def spread(values: Sequence[float]) -> Spread:
    """
    >>> spread([1.0, 3.0]), spread([5.0])
    (Spread(mean=2.0, std=1.4142135623730951, n=2), Spread(mean=5.0, std=None, n=1))
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    mean = values[0] if len(set(values)) == 1 else statistics.fmean(values)  # a count stays whole
    return Spread(mean, std, len(values))


# What tells rows of one label apart, the shortest that does.
DISTINCTIONS: tuple[Callable[[Run], str], ...] = (
    lambda run: axes_words(run.axes) or run.variety, lambda run: run.variety, lambda run: run.model,
    lambda run: run.budget, lambda run: run.metric)  # fmt: skip


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    first = [group[0] for group in groups]
    names = pd.Series([run.label for run in first], dtype=str)
    for distinction in DISTINCTIONS:
        words = pd.Series(map(distinction, first), dtype=str)
        differ = words.groupby(names).transform("nunique") > 1  # pyright: ignore[reportOperatorIssue] (a Series)
        names = names.mask(differ, (names + " " + words).str.strip())
    alike = {name: list(runs) for name, runs in pd.Series(first, dtype=object).groupby(names)}
    return [f"{name} {_unlike(run, alike[name])}".strip() for name, run in zip(names, first)]


def _unlike(run: Run, others: Sequence[Run]) -> str:
    """The settings that its sweep did not vary and in which it differs from others."""
    return " ".join(f"{key}={value}" for key, value in run.asked.items()
                    if any(other.asked.get(key, value) != value for other in others))  # fmt: skip


def axes_words(axes: dict[str, Any]) -> str:
    """
    >>> axes_words({"method.r": 8, "method.init": "pissa"})
    'r=8 init=pissa'
    """
    return " ".join(f"{axis.split('.')[-1]}={value}" for axis, value in axes.items())
