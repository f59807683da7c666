"""What is drawn of a sweep over settings: a line or bars over one, a map over two, bars over more.

A panel for each of what all its runs have: the metric, the held-out loss of the answers, that of general text.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from peft_jax.studies.comparison import plot_style
from peft_jax.studies.comparison.columns import spread_words
from peft_jax.studies.comparison.formatting import setting, tick_label
from peft_jax.studies.comparison.plots import Plot, Styles, measure, rendered, subject
from peft_jax.studies.comparison.rows import Row, Spread, axes_words, grouped, measured_on
from peft_jax.studies.comparison.runs import Run


def ablations(runs: Sequence[Run], styles: Styles) -> list[Plot]:
    """A plot of every sweep among the finished ``runs``, chosen or not; ``styles`` has a style for each label.

    Runs are of one sweep that share model, budget, metric and the names of the settings varied. All are drawn by the
    metric on validation if any lacks it on test.
    """
    sweeps: dict[tuple, list[Run]] = {}
    for run in runs:
        if run.finished and run.axes and run.measured_on:
            sweeps.setdefault((run.model, run.budget, run.metric, tuple(run.axes)), []).append(run)
    return [plot for sweep in sweeps.values() for plot in _sweep(sweep, styles)]


def _sweep(runs: Sequence[Run], styles: Styles) -> list[Plot]:
    on = next((on for on in ("test", "validation") if all(on in run.values for run in runs)), None)
    if on is None:
        return []
    as_they_came = sorted(grouped(runs), key=lambda row: runs.index(row.runs[0]))  # not best first
    rows = [measured_on(on, row) for row in as_they_came]
    axes = [axis for axis in runs[0].axes if len({str(row.axes[axis]) for row in rows}) > 1]
    with matplotlib.rc_context(plot_style.STYLE):
        if len(axes) == 1:
            numeric = all(_numeric(row.axes[axes[0]]) for row in rows)
            return [(_line if numeric else _bars)(rows, axes[0], styles)]
        if len(axes) == 2:
            labels = dict.fromkeys(row.label for row in rows)
            return [_map([row for row in rows if row.label == label], axes, label) for label in labels]
        return [_every(rows, axes)] if axes else []


def _panels(rows: Sequence[Row]) -> dict[str, str]:
    """{key of ``Row.values``: what it is} of what there is to draw."""
    unit = "(nats per token)"
    words = {"value": measure(rows[0]), "before.loss": f"loss of the answers before training {unit}",
             "loss": f"loss of the answers {unit}", "before.general": f"loss of general text before training {unit}",
             "general": f"loss of general text {unit}"}  # fmt: skip
    same = {"loss", "before.loss"} if rows[0].metric == "-loss" else set()
    return {key: word for key, word in words.items() if key not in same and all(key in row.values for row in rows)}


def _wrapped(words: str, letters: int = 24) -> str:
    return "\n".join(textwrap.wrap(words, letters))


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _title(rows: Sequence[Row], words: str) -> str:
    labels = list(dict.fromkeys(row.label for row in rows))
    of = f" of {plot_style.plot_label(labels[0])}" if len(labels) == 1 else ""
    return f"{measure(rows[0]).capitalize()}{of} {words}\n{subject(rows[0])}"


def _caption(rows: Sequence[Row], words: str) -> str:
    return f"{_title(rows, words).replace(chr(10), ': ')}; with the sample standard deviation over seeds."


def _ordered(rows: Sequence[Row], axis: str) -> list[Any]:
    """The values of a setting, numbers by size, others as they came."""
    values = list({str(row.axes[axis]): row.axes[axis] for row in rows}.values())
    return sorted(values) if all(map(_numeric, values)) else values


def _line(rows: Sequence[Row], axis: str, styles: Styles) -> Plot:
    """Points and a line for each label; a logarithmic axis where the setting spans more than a factor of ten."""
    words, places = f"against {setting(axis)}", _ordered(rows, axis)
    labels = list(dict.fromkeys(row.label for row in rows))
    titles = _panels(rows)
    height = max(1 + 2 * len(titles), plot_style.height_for(len(labels)))
    figure, panels = plot_style.new_figure(_title(rows, words), 7.8, height, len(titles), stacked=True)
    for axes, (key, what) in zip(panels, titles.items()):
        for label in labels:
            label_rows = sorted((row for row in rows if row.label == label), key=lambda row: row.axes[axis])
            values, style = [row.values[key] for row in label_rows], styles[label]
            axes.errorbar([row.axes[axis] for row in label_rows], [value.mean for value in values],
                          [value.std or 0 for value in values], label=plot_style.plot_label(label), color=style.colour,
                          marker=style.marker, linestyle=style.dash, capsize=2.5, linewidth=1.4)  # fmt: skip
        axes.set_ylabel(_wrapped(what))
    panels[-1].set_xlabel(setting(axis))
    _ticks(panels, places)
    if len(labels) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8.5)
    return rendered(f"ablation-{axis}", _caption(rows, words), figure)


def _ticks(panels: Sequence[Axes], places: Sequence[float]) -> None:
    """The x axis that the panels share, with a number at every place if there is room."""
    if places[0] > 0 and places[-1] > 10 * places[0]:
        plot_style.logarithmic(panels[-1].xaxis)
        places = _roomy(places, np.log)
    else:
        places = _roomy(places, np.asarray)
    if places:
        panels[-1].set_xticks(places, [tick_label(place) for place in places])
        for axes in panels:
            axes.xaxis.minorticks_off()


def _roomy(places: Sequence[float], scale: Callable) -> list[float]:
    """The places, if a number can stand at each of them; else none."""
    at = np.asarray(scale(places), float)
    return list(places) if np.diff(at).min() > (at[-1] - at[0]) / 12 else []


def _bars(rows: Sequence[Row], axis: str, styles: Styles) -> Plot:
    """A bar for each value of a setting that is no number, side by side for several labels."""
    words, places = f"against {setting(axis)}", [str(value) for value in _ordered(rows, axis)]
    labels = list(dict.fromkeys(row.label for row in rows))
    wide = 0.8 / len(labels)
    titles = _panels(rows)
    height = 1.6 + len(places) * (0.2 + 0.24 * len(labels))
    figure, panels = plot_style.new_figure(_title(rows, words), 7.8, height, len(titles))
    for axes, (key, what) in zip(panels, titles.items()):
        for at, label in enumerate(labels):
            label_rows = [row for row in rows if row.label == label]
            middles = [places.index(str(row.axes[axis])) + (at + 0.5) * wide - 0.4 for row in label_rows]
            values = [row.values[key] for row in label_rows]
            plot_style.bars(axes, middles, values, 0.9 * wide, styles[label].colour, label)
        plot_style.name_bars(axes, places)
        axes.set_xlabel(_wrapped(what))
    panels[0].set_ylabel(setting(axis))
    if len(labels) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8.5)
    return rendered(f"ablation-{axis}", _caption(rows, words), figure)


def _map(rows: Sequence[Row], pair: Sequence[str], label: str) -> Plot:
    """Two settings as a map, the values written in."""
    down, right = (_ordered(rows, axis) for axis in pair)
    words, titles = f"against {setting(pair[0])} and {setting(pair[1])}", _panels(rows)
    wide, high = max(3.0, 0.9 + 0.85 * len(right)), 1.6 + 0.55 * len(down)
    stacked = 1.6 + len(titles) * wide > 14
    columns, lines = (1, len(titles)) if stacked else (len(titles), 1)
    width, height = max(7.2, 1.6 + wide * columns), 0.6 + high * lines
    figure, panels = plot_style.new_figure(_title(rows, words), width, height, len(titles), stacked)
    for axes, (key, what) in zip(panels, titles.items()):
        places = [(down.index(row.axes[pair[0]]), right.index(row.axes[pair[1]])) for row in rows]
        mesh = _coloured(axes, places, [row.values[key] for row in rows], (len(down), len(right)), key != "value")
        bar = figure.colorbar(mesh, ax=axes, label=f"{'lower' if key != 'value' else 'higher'} is better")
        ends: dict[Any, None] = dict.fromkeys((mesh.norm.vmin, mesh.norm.vmax))  # the fields say the numbers
        bar.set_ticks(list(ends), labels=["low", "high"][:len(ends)])
        _map_axes(axes, down, right)
        axes.set_xlabel(setting(pair[1]))
        axes.set_title(_wrapped(what, 80 if stacked else int(9 * wide)), fontsize=9, fontweight="normal")
    for axes in panels if stacked else panels[:1]:
        axes.set_ylabel(setting(pair[0]))
    return rendered(f"ablation-{pair[0]}-{pair[1]}-{label}", _caption(rows, words), figure)


def _map_axes(axes: Axes, down: Sequence[Any], right: Sequence[Any]) -> None:
    """The values of both settings beside the fields of a map: numbers upwards, others as in the sweep, from the top."""
    axes.set_xticks(np.arange(len(right)) + 0.5, [plot_style.plot_label(str(value)) for value in right])
    axes.set_yticks(np.arange(len(down)) + 0.5, [plot_style.plot_label(str(value)) for value in down])
    axes.set_ylim(*((0, len(down)) if all(map(_numeric, down)) else (len(down), 0)))
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _coloured(axes: Axes, places: Sequence[tuple[int, int]], values: Sequence[Spread], size: tuple[int, int],
              less: bool) -> QuadMesh:
    """The field of a map, bright where it is better: where ``less`` is, of a loss."""
    table = np.full(size, np.nan)
    for place, value in zip(places, values):
        table[place] = value.mean
    mesh = axes.pcolormesh(np.ma.masked_invalid(table), cmap="cividis_r" if less else "cividis", edgecolors="white",
                           linewidth=1.5)  # fmt: skip
    norm: Any = mesh.norm  # which takes floats, too, though matplotlib's type does not say so
    for (row, column), value in zip(places, values):
        dark = (norm(value.mean) < 0.47) != less
        axes.annotate(spread_words(value, lambda number, like: f"{number:.3f}", value.n).replace(" ±", "\n±"),
                      (column + 0.5, row + 0.5), ha="center", va="center", fontsize=8.5,
                      color="white" if dark else "black")  # fmt: skip
    return mesh


def _every(rows: Sequence[Row], names: Sequence[str]) -> Plot:
    """More than two settings: a bar for each combination, best first."""
    words, rows = f"for each {', '.join(map(setting, names))}", sorted(rows, key=lambda row: -row.values["value"].mean)
    titles = _panels(rows)
    figure, panels = plot_style.new_figure(_title(rows, words), 7.8, 1.6 + 0.34 * len(rows), len(titles))
    several = len({row.label for row in rows}) > 1
    settings = [axes_words({axis: row.axes[axis] for axis in names}) for row in rows]
    for axes, (key, what) in zip(panels, titles.items()):
        plot_style.bars(axes, range(len(rows)), [row.values[key] for row in rows], 0.7, plot_style.COLOURS[0], "")
        plot_style.name_bars(axes, [f"{row.label} {words}" if several else words for row, words in zip(rows, settings)])
        axes.set_xlabel(_wrapped(what))
    return rendered(f"ablation-{'-'.join(names)}", _caption(rows, words), figure)
