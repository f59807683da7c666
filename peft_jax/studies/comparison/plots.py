"""What is drawn of a comparison: the metric against its price, forgetting against gain, losses, latencies."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from peft_jax.studies.comparison import draw
from peft_jax.studies.comparison.draw import GREY, Style
from peft_jax.studies.comparison.labels import label
from peft_jax.studies.comparison.rows import Row, spread
from peft_jax.studies.comparison.words import TITLES, short


class Plot(NamedTuple):
    """name: of its files. caption: what it shows, in one sentence. svg, png: on white."""

    name: str
    caption: str
    svg: str
    png: bytes


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (price, worth) points no other beats, cheapest first.

    A point is beaten by one that costs no more and is worth no less, and is better in one of the two; equal points do
    not beat each other. A point with NaN is never on the front.

    >>> pareto([(1, 0.5), (2, 0.4), (3, 0.6)])
    [0, 2]
    """
    there = [at for at, point in enumerate(points) if not any(map(math.isnan, point))]
    front = [at for at in there if not any(_beats(points[other], points[at]) for other in there)]
    return sorted(front, key=lambda at: points[at][0])


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def plots(rows: Sequence[Row], look: Mapping[str, Style]) -> list[Plot]:
    """Every plot that rows of one model, budget and metric have the numbers for; ``look`` is ``draw.styles`` of all
    names. Rows measured on validation only are left out where others were measured on test."""
    on = "test" if any(row.measured_on == "test" for row in rows) else "validation"
    rows = [row for row in rows if row.measured_on == on]
    sources = dict.fromkeys(key for row in rows for key in row.values if key.startswith("forgetting."))
    made = [_priced(rows, look, *PARAMETERS), _priced(rows, look, *MEMORY),
            *(_forgetting(rows, look, source) for source in sources),
            _losses(rows, look), _latencies(rows)]  # fmt: skip
    return [plot for plot in made if plot]


def subject(row: Row) -> str:
    """What a plot is of: the second line of its title."""
    return ", ".join(part for part in (short(row.model), row.budget, f"on {row.measured_on}") if part)


def measure(row: Row) -> str:
    return TITLES.get(row.metric, row.metric)


def rendered(name: str, caption: str, made: Figure) -> Plot:
    """Drawn; ``name`` becomes one that every file system takes."""
    return Plot(draw.slug(name), caption, draw.svg(made), draw.png(made))


# name, key, unit, what one says of it, whether the axis is logarithmic
PARAMETERS = ("metric-parameters", "trainable", 1, "trainable parameters", True)
MEMORY = ("metric-memory", "memory.observed", 1e9, "peak memory in training (GB)", False)


def _priced(rows, look, file: str, key: str, unit: float, words: str, log: bool) -> Plot | None:
    """The metric against what it costs, with the front that no method beats."""
    rows = [row for row in rows if key in row.values and "value" in row.values]
    rows = [row for row in rows if row.values[key].mean > 0 or not log]
    if not rows:
        return None
    metric = measure(rows[0])
    with matplotlib.rc_context(draw.STYLE):
        title = f"{metric.capitalize()} against {words}\n{subject(rows[0])}"
        made, (axes,) = draw.figure(title, height=draw.room(len(rows)))
        axes.set(xlabel=words, ylabel=metric, **({"xscale": "log"} if log else {}))
        points = _scatter(axes, rows, look, (key, unit), ("value", 1))
        base = base_of(rows)
        axes.update_datalim([(points[0][0], value) for value in base])
        draw.leave_room(axes)
        lines = [*_front(axes, points), *(_level(axes, value) for value in base)]
        if log:
            draw.logarithmic(axes.xaxis)
        label(axes, [(*point, row.name) for point, row in zip(points, rows)], lines)
        return rendered(file, f"{metric.capitalize()} ({subject(rows[0])}) against {words}; bars are the sample "
                        "standard deviation over seeds, the dashed line is the Pareto front: no method gives more for "
                        "less.", made)  # fmt: skip


def _front(axes, points) -> list[list]:
    """Draws the front as a stair, and returns its corners."""
    front = [points[at] for at in pareto(points)]
    axes.step(*zip(*front), where="post", color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    return [corner for (x, y), (right, up) in itertools.pairwise(front)
            for corner in ([(x, y), (right, y)], [(right, y), (right, up)])]  # fmt: skip


def base_of(rows: Sequence[Row]) -> list[float]:
    """The untouched model's metric; nothing where it was not measured on the same examples."""
    return [row.values["base"].mean for row in rows if "base" in row.values and row.measured_on == "test"][:1]


def _level(axes, base: float) -> list[tuple[float, float]]:
    """A line to measure a gain by."""
    axes.axhline(base, color=GREY, linewidth=1, linestyle=":")
    axes.annotate("base model", (1, base), (-2, 3), xycoords=("axes fraction", "data"), ha="right",
                  textcoords="offset points", fontsize=8)  # fmt: skip
    return [(x, base) for x in axes.get_xlim()]


def _scatter(axes, rows, look, across, up) -> list[tuple[float, float]]:
    """Points with their spread in both directions; (key, unit) of each."""
    points = []
    for row in rows:
        style = look[row.name]
        (x, wide), (y, high) = ([number / unit for number in (row.values[key].mean, row.values[key].std or 0)]
                                for key, unit in (across, up))  # fmt: skip
        axes.errorbar(x, y, xerr=wide or None, yerr=high or None, color=style.colour, marker=style.marker,
                      markersize=7, linestyle="none", elinewidth=1.2, capsize=2.5)  # fmt: skip
        points.append((x, y))
    return points


def _forgetting(rows, look, source: str) -> Plot | None:
    rows = [row for row in rows if source in row.values and "gain" in row.values]
    if not rows:
        return None
    text, metric = source.partition(".")[2], measure(rows[0])
    with matplotlib.rc_context(draw.STYLE):
        title = f"Forgetting ({draw.name(text)}) against gain in {metric}\n{subject(rows[0])}"
        made, (axes,) = draw.figure(title, height=draw.room(len(rows)))
        axes.set(xlabel=f"gain in {metric} over the base model",
                 ylabel=f"loss on {draw.name(text)}, after − before\n(nats per token)")  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=1, linestyle=":")
        points = _scatter(axes, rows, look, ("gain", 1), (source, 1))
        draw.leave_room(axes)
        label(axes, [(*point, row.name) for point, row in zip(points, rows)],
              [[(x, 0.0) for x in axes.get_xlim()]])  # fmt: skip
        return rendered(f"forgetting-{text}", f"How much worse the model became at general text ({text}) for what it "
                        f"gained in {metric} ({subject(rows[0])}): right and low is best; bars are the sample "
                        "standard deviation over seeds.", made)  # fmt: skip


def _losses(rows, look) -> Plot | None:
    """One line a row, the mean over its seeds, smoothed enough to be told apart."""
    curves = {row.name: loss_curve([run.loss for run in row.runs]) for row in rows}
    curves = {name: curve for name, curve in curves.items() if np.isfinite(curve[1]).any()}
    if not curves:
        return None
    with matplotlib.rc_context(draw.STYLE):
        title = f"Training loss\n{subject(rows[0])}".rpartition(",")[0]
        made, (axes,) = draw.figure(title, 7.8, draw.room(len(curves)))
        for name, (steps, mean, std) in sorted(curves.items(), key=lambda item: -_last(item[1][1])):
            style = look[name]
            axes.plot(steps, mean, color=style.colour, linestyle=style.dash, linewidth=1.5, label=draw.name(name))
            if np.isfinite(std).any():
                axes.fill_between(steps, mean - std, mean + std, color=style.colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        made.legend(loc="outside right upper", fontsize=8.5)
        return rendered("loss", "Training loss of the runs that the table shows, the highest at the end first: mean "
                        "over seeds, running mean over a twentieth of the logged values; bands are the sample standard "
                        "deviation over seeds.", made)  # fmt: skip


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


def loss_curve(losses: Sequence[Sequence[tuple[float, float | None]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(steps, mean, standard deviation) over runs, each smoothed by a trailing mean over a twentieth of its values.

    A loss that is missing or NaN stays a gap of its run. The deviation is NaN where fewer than two runs have a loss.
    """
    runs = [dict(zip([step for step, _ in run], _smoothed([loss for _, loss in run]))) for run in losses]
    steps = sorted({step for run in runs for step in run})
    table = np.array([[run.get(step, np.nan) for step in steps] for run in runs], float).reshape(len(runs), len(steps))
    count = np.isfinite(table).sum(axis=0)
    mean = np.where(count > 0, np.nansum(table, axis=0) / np.maximum(count, 1), np.nan)
    squares = np.nansum((table - mean) ** 2, axis=0)
    return np.array(steps), mean, np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)


def _smoothed(values: Sequence[float | None]) -> list[float]:
    """
    >>> _smoothed([1.0, None, 3.0])
    [1.0, nan, 3.0]
    """
    wide = max(1, len(values) // 20)
    floats = np.array([math.nan if value is None else value for value in values], float)
    windows = (floats[max(0, at + 1 - wide):at + 1] for at in range(len(floats)))
    return [float(np.nanmean(window)) if math.isfinite(value) else math.nan
            for value, window in zip(floats, windows)]  # fmt: skip


def _latencies(rows) -> Plot | None:
    """Bars: the base model's, each method's unmerged and merged; prefill and one token side by side."""
    rows = [row for row in rows if any(key.startswith("latency.unmerged") for key in row.values)]
    if not rows:
        return None
    with matplotlib.rc_context(draw.STYLE):
        made, panels = draw.figure(f"Latency\n{short(rows[0].model)}", 7.8, 1.6 + 0.42 * len(rows), panels=2)
        for axes, phase, words in zip(panels, ("prefill", "token"), ("prefill (ms)", "each new token (ms)")):
            draw.named(axes, ["base model", *(row.name for row in rows)])
            axes.set_xlabel(words)
            for state in KINDS:
                _latency(axes, rows, state, phase)
        made.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8.5)
        return rendered("latency", "Time to read a prompt and to write one more token, with the adapter beside the "
                        "weights and merged into them; no second bar where that cannot be done.", made)  # fmt: skip


KINDS = {"base": (0, GREY, None), "unmerged": (-0.2, draw.COLOURS[0], None), "merged": (0.2, draw.COLOURS[4], "///")}


def _latency(axes, rows: Sequence[Row], state: str, phase: str) -> None:
    offset, colour, hatch = KINDS[state]
    key = f"latency.{state}.{phase}"
    there = [(at + 1, row.values[key]) for at, row in enumerate(rows) if key in row.values]
    if there and state == "base":  # measured again with each method: one bar of them all
        there = [(0, spread([value.mean for _, value in there]))]
    if there:
        places, values = [at + offset for at, _ in there], [value for _, value in there]
        draw.bars(axes, places, values, 0.36, colour, state, hatch, 1e3)
