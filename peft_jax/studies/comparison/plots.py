"""What is drawn of a comparison: the metric against its price, forgetting against gain, losses, latencies."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from peft_jax.studies.comparison import plot_style
from peft_jax.studies.comparison.formatting import TITLES, short_name
from peft_jax.studies.comparison.label_placement import label
from peft_jax.studies.comparison.plot_style import GREY, Style
from peft_jax.studies.comparison.rows import Row, spread

Styles = Mapping[str, Style]  # of each name


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
    numbers = [at for at, point in enumerate(points) if not any(map(math.isnan, point))]
    front = [at for at in numbers if not any(_beats(points[other], points[at]) for other in numbers)]
    return sorted(front, key=lambda at: points[at][0])


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def comparison_plots(rows: Sequence[Row], styles: Styles) -> list[Plot]:
    """Every plot that rows of one model, budget and metric have the numbers for; ``styles`` has one for each name.

    Rows measured on validation only are left out where others were measured on test.
    """
    on = "test" if any(row.measured_on == "test" for row in rows) else "validation"
    rows = [row for row in rows if row.measured_on == on]
    sources = dict.fromkeys(key for row in rows for key in row.values if key.startswith("forgetting."))
    possible = [_against_cost(rows, styles, PARAMETERS), _against_cost(rows, styles, MEMORY),
                *(_forgetting(rows, styles, source) for source in sources),
                _losses(rows, styles), _latencies(rows)]  # fmt: skip
    return [plot for plot in possible if plot]


def subject(row: Row) -> str:
    """What a plot is of: the second line of its title."""
    return ", ".join(part for part in (short_name(row.model), row.budget, f"on {row.measured_on}") if part)


def measure(row: Row) -> str:
    return TITLES.get(row.metric, row.metric)


def rendered(name: str, caption: str, figure: Figure) -> Plot:
    """Drawn; ``name`` becomes one that every file system takes."""
    return Plot(plot_style.slug(name), caption, plot_style.svg(figure), plot_style.png(figure))


class Cost(NamedTuple):
    """file: the plot's name. key: of ``Row.values``. unit: what the axis counts in. words: what the axis is called."""

    file: str
    key: str
    unit: float
    words: str
    logarithmic: bool


PARAMETERS = Cost(file="metric-parameters", key="trainable", unit=1, words="trainable parameters", logarithmic=True)
MEMORY = Cost(file="metric-memory", key="memory", unit=1e9, words="memory of a training step (GB)", logarithmic=False)


def _against_cost(rows: Sequence[Row], styles: Styles, cost: Cost) -> Plot | None:
    """The metric against what it costs, with the front that no method beats."""
    rows = [row for row in rows if cost.key in row.values and "value" in row.values]
    rows = [row for row in rows if row.values[cost.key].mean > 0 or not cost.logarithmic]
    if not rows:
        return None
    metric = measure(rows[0])
    with matplotlib.rc_context(plot_style.STYLE):
        title = f"{metric.capitalize()} against {cost.words}\n{subject(rows[0])}"
        figure, (axes,) = plot_style.new_figure(title, height=plot_style.height_for(len(rows)))
        axes.set(xlabel=cost.words, ylabel=metric, **({"xscale": "log"} if cost.logarithmic else {}))
        points = _scatter(axes, rows, styles, (cost.key, cost.unit), ("value", 1))
        base = base_of(rows)
        axes.update_datalim([(points[0][0], value) for value in base])
        plot_style.leave_room(axes)
        lines = [*_front(axes, points), *(_level(axes, value) for value in base)]
        if cost.logarithmic:
            plot_style.logarithmic(axes.xaxis)
        label(axes, [(*point, row.name) for point, row in zip(points, rows)], lines)
        return rendered(cost.file, f"{metric.capitalize()} ({subject(rows[0])}) against {cost.words}; bars are the "
                        "sample standard deviation over seeds, the dashed line is the Pareto front: no method gives "
                        "more for less.", figure)  # fmt: skip


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> list[list]:
    """Draws the front as a stair, and returns its corners."""
    front = [points[at] for at in pareto(points)]
    axes.step(*zip(*front), where="post", color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    return [corner for (x, y), (right, up) in itertools.pairwise(front)
            for corner in ([(x, y), (right, y)], [(right, y), (right, up)])]  # fmt: skip


def base_of(rows: Sequence[Row]) -> list[float]:
    """The untouched model's metric; nothing where it was not measured on the same examples."""
    return [row.values["base"].mean for row in rows if "base" in row.values and row.measured_on == "test"][:1]


def _level(axes: Axes, base: float) -> list[tuple[float, float]]:
    """A line to measure a gain by."""
    axes.axhline(base, color=GREY, linewidth=1, linestyle=":")
    axes.annotate("base model", (1, base), (-2, 3), xycoords=("axes fraction", "data"), ha="right",
                  textcoords="offset points", fontsize=8)  # fmt: skip
    return [(x, base) for x in axes.get_xlim()]


def _scatter(axes: Axes, rows: Sequence[Row], styles: Styles, across: tuple[str, float],
             up: tuple[str, float]) -> list[tuple[float, float]]:  # fmt: skip
    """Points with their spread in both directions; (key, unit) of each."""
    points = []
    for row in rows:
        style = styles[row.name]
        (x, wide), (y, high) = ([number / unit for number in (row.values[key].mean, row.values[key].std or 0)]
                                for key, unit in (across, up))  # fmt: skip
        axes.errorbar(x, y, xerr=wide or None, yerr=high or None, color=style.colour, marker=style.marker,
                      markersize=7, linestyle="none", elinewidth=1.2, capsize=2.5)  # fmt: skip
        points.append((x, y))
    return points


def _forgetting(rows: Sequence[Row], styles: Styles, source: str) -> Plot | None:
    rows = [row for row in rows if source in row.values and "gain" in row.values]
    if not rows:
        return None
    text, metric = source.partition(".")[2], measure(rows[0])
    with matplotlib.rc_context(plot_style.STYLE):
        title = f"Forgetting ({plot_style.plot_label(text)}) against gain in {metric}\n{subject(rows[0])}"
        figure, (axes,) = plot_style.new_figure(title, height=plot_style.height_for(len(rows)))
        axes.set(xlabel=f"gain in {metric} over the base model",
                 ylabel=f"loss on {plot_style.plot_label(text)}, after − before\n(nats per token)")  # fmt: skip
        axes.axhline(0, color=GREY, linewidth=1, linestyle=":")
        points = _scatter(axes, rows, styles, ("gain", 1), (source, 1))
        plot_style.leave_room(axes)
        label(axes, [(*point, row.name) for point, row in zip(points, rows)],
              [[(x, 0.0) for x in axes.get_xlim()]])  # fmt: skip
        return rendered(f"forgetting-{text}", f"How much worse the model became at general text ({text}) for what it "
                        f"gained in {metric} ({subject(rows[0])}): right and low is best; bars are the sample "
                        "standard deviation over seeds.", figure)  # fmt: skip


def _losses(rows: Sequence[Row], styles: Styles) -> Plot | None:
    """One line a row, the mean over its seeds, smoothed enough to be told apart."""
    curves = {row.name: loss_curve([run.loss for run in row.runs]) for row in rows}
    curves = {name: curve for name, curve in curves.items() if any(curve["mean"].notna())}
    if len({row.label for row in rows}) == len(rows):  # else by what was varied, as the rows are
        curves = dict(sorted(curves.items(), key=lambda item: -item[1]["mean"].dropna().iloc[-1]))
    if not curves:
        return None
    with matplotlib.rc_context(plot_style.STYLE):
        title = f"Training loss\n{subject(rows[0])}".rpartition(",")[0]
        figure, (axes,) = plot_style.new_figure(title, 7.8, plot_style.height_for(len(curves)))
        for name, curve in curves.items():
            style, mean, std = styles[name], curve["mean"], curve["std"]
            axes.plot(mean, color=style.colour, linestyle=style.dash, linewidth=1.5, label=plot_style.plot_label(name))
            if any(std.notna()):
                axes.fill_between(mean.index, mean - std, mean + std, color=style.colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        figure.legend(loc="outside right upper", fontsize=8.5)
        return rendered("loss", "Training loss of the runs that the table shows: mean "
                        "over seeds, running mean over a twentieth of the logged values; bands are the sample standard "
                        "deviation over seeds.", figure)  # fmt: skip


def loss_curve(losses: Sequence[Sequence[tuple[float, float | None]]]) -> pd.DataFrame:
    """The columns ``mean`` and ``std`` by step over runs, each smoothed by a trailing mean over a twentieth of its
    values.

    A loss that is missing or NaN stays a gap of its run. The deviation is NaN where fewer than two runs have a loss.
    """
    curves: list[Any] = [pd.Series(dict(run), dtype=float) for run in losses]  # pandas types rolling means too widely
    smooth = [curve.rolling(max(1, len(curve) // 20), min_periods=1).mean().where(curve.notna()) for curve in curves]
    frame = pd.DataFrame(dict(enumerate(smooth))).sort_index()  # pandas 2 concatenates no empty list
    return pd.DataFrame({"mean": frame.mean(axis=1), "std": frame.std(axis=1)})


def _latencies(rows: Sequence[Row]) -> Plot | None:
    """Bars: the base model's, each method's unmerged and merged; prefill and one token side by side."""
    rows = [row for row in rows if any(key.startswith("latency.unmerged") for key in row.values)]
    if not rows:
        return None
    with matplotlib.rc_context(plot_style.STYLE):
        title = f"Latency\n{short_name(rows[0].model)}"
        figure, panels = plot_style.new_figure(title, 7.8, 1.6 + 0.42 * len(rows), panels=2)
        for axes, phase, words in zip(panels, ("prefill", "token"), ("prefill (ms)", "each new token (ms)")):
            plot_style.name_bars(axes, ["base model", *(row.name for row in rows)])
            axes.set_xlabel(words)
            for state in STATES:
                _latency(axes, rows, state, phase)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8.5)
        return rendered("latency", "Time to read a prompt and to write one more token, with the adapter beside the "
                        "weights and merged into them; no second bar where that cannot be done.", figure)  # fmt: skip


# Offset, colour and hatch of the bars of each state.
STATES = {"base": (0, GREY, None), "unmerged": (-0.2, plot_style.COLOURS[0], None),
          "merged": (0.2, plot_style.COLOURS[4], "///")}  # fmt: skip


def _latency(axes: Axes, rows: Sequence[Row], state: str, phase: str) -> None:
    offset, colour, hatch = STATES[state]
    key = f"latency.{state}.{phase}"
    bars = [(at + 1, row.values[key]) for at, row in enumerate(rows) if key in row.values]
    if bars and state == "base":  # measured again with each method: one bar of them all
        bars = [(0, spread([value.mean for _, value in bars]))]
    if bars:
        places, values = [at + offset for at, _ in bars], [value for _, value in bars]
        plot_style.bars(axes, places, values, 0.36, colour, state, hatch, 1e3)
