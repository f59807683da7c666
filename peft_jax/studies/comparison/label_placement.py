"""Names beside points, where they can be read."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.text import Annotation

from peft_jax.studies.comparison.plot_style import DPI, GREY, plot_label

# Places tried for a name: every 22.5 degrees, at these distances from its point in pixels of the figure.
DISTANCES = (11, 18, 27, 38, 52, 72, 96, 124, 156, 192, 232)
ANGLES = [math.pi / 8 * at for at in (0, 1, 15, 4, 12, 8, 7, 9, 2, 14, 6, 10, 3, 13, 5, 11)]
NEAR = 27  # farther away a line leads from the name to its point
Box = tuple[float, float, float, float]  # left, low, right, high in pixels


def label(axes: Axes, points: Sequence[tuple[float, float, str]],
          lines: Sequence[Sequence[tuple]] = ()) -> list[Annotation]:  # fmt: skip
    """Write a name beside each point (x, y, name), where it covers neither a point, nor an error bar, nor one of the
    level or upright ``lines``, nor other text, and stays inside the axes; with a line to its point if that is far.

    Everything in data coordinates. The axes' limits must be final. Returns the annotations.
    """
    figure = axes.figure.get_figure(root=True)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # what is placed now must stay where it is
    centres = [tuple(axes.transData.transform(point[:2])) for point in points]
    obstacles = {"points": [(x - 9, y - 9, x + 9, y + 9) for x, y in centres], "lines": _line_boxes(axes, lines),
             "words": [tuple(text.get_window_extent().extents) for text in axes.texts]}  # fmt: skip
    # The most crowded first: those with room find a place in any case.
    crowded = sorted(range(len(points)), key=lambda at: sum(math.dist(centres[at], other) for other in centres))
    return [_write(axes, points[at], centres[at], obstacles) for at in crowded]


def _write(axes: Axes, point: tuple[float, float, str], centre: tuple[float, float],
           obstacles: dict[str, list[Box]]) -> Annotation:  # fmt: skip
    """Write one name in the best place that is left, and add it to ``obstacles``."""
    note = axes.annotate(plot_label(point[2]), point[:2], (0, 0), textcoords="offset points", fontsize=8.5,
                         ha="center", va="center")  # fmt: skip
    size = note.get_window_extent().size + np.array([6, 2])
    box, leader = _best(centre, size, obstacles, axes.get_window_extent().extents)
    right, up = ((low + high) / 2 - start for low, high, start in zip(box[:2], box[2:], centre))
    note.set_position((right * 72 / DPI, up * 72 / DPI))
    if leader:
        ends = axes.transData.inverted().transform([centre, _edge(box, centre)])
        axes.plot(*zip(*ends), color=GREY, linewidth=0.7, zorder=1)
    obstacles["words"].append(box)
    obstacles["lines"] += leader
    return note


def _line_boxes(axes: Axes, lines: Sequence[Sequence[tuple]]) -> list[Box]:
    """Boxes of the lines and of the error bars."""
    bars = [segment for bar in axes.collections if isinstance(bar, LineCollection)
            for segment in bar.get_segments()]
    ends = [axes.transData.transform(line) for line in (*lines, *bars) if len(line)]
    return [(*(end.min(axis=0) - 3), *(end.max(axis=0) + 3)) for end in ends]


# How bad it is to cover a pixel: of a word, which then cannot be read; of a point; of a mere line.
WEIGHTS = {"words": 100, "points": 20, "lines": 1}


def _best(centre: tuple[float, float], size: np.ndarray, obstacles: Mapping[str, Sequence[Box]], inside: Box,
          ) -> tuple[Box, list[Box]]:  # fmt: skip
    """The place that covers least, the nearest of those that cover nothing; and its line, as boxes along it."""
    places = []
    width, height = size
    for distance, angle in itertools.product(DISTANCES, ANGLES):
        x = centre[0] + math.cos(angle) * (distance + width / 2)
        y = centre[1] + math.sin(angle) * (distance + height / 2)
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        leader = _leader(box, centre) if distance > NEAR else []
        outside = width * height - _shared_area([box], [inside])
        covered = 100 * outside + sum(weight * _shared_area([box], obstacles[kind]) for kind, weight in WEIGHTS.items())
        covered += 20 * _shared_area(leader, obstacles["words"])
        places.append((covered, distance, box, leader))
        if not covered:
            break
    return min(places, key=lambda place: place[:2])[2:]


def _leader(box: Box, centre: tuple[float, float]) -> list[Box]:
    """Small boxes along the line from a point to its name."""
    end = _edge(box, centre)
    steps = max(2, int(math.dist(centre, end) / 4))
    middles = [tuple(a + (b - a) * at / steps for a, b in zip(centre, end)) for at in range(3, steps)]
    return [(x - 2, y - 2, x + 2, y + 2) for x, y in middles]


def _shared_area(some: Sequence[Box], others: Sequence[Box]) -> float:
    """The area that ``some`` boxes share with ``others``."""
    if not some or not others:
        return 0.0
    one, other = np.array(some)[:, None], np.array(others)[None]
    sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
    return float(np.prod(np.clip(sides, 0, None), axis=-1).sum())


def _edge(box: Box, centre: tuple[float, float]) -> tuple[float, float]:
    """The point of a box that is nearest to ``centre``."""
    return min(max(centre[0], box[0]), box[2]), min(max(centre[1], box[1]), box[3])
