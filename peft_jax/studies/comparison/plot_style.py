"""How plots look: colours, sizes, bars, and figures as SVG and PNG.

No state of pyplot is touched: figures are made and saved inside ``matplotlib.rc_context(STYLE)``.
"""

import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from peft_jax.studies.comparison.formatting import printable, shortened, three_digits, tick_label
from peft_jax.studies.comparison.rows import Spread

INK = "#1a1a1b"  # of text and axes only, so that a page can put its own text colour in its place
GREY = "#8a8a8a"
DPI = 144
LONGEST = 34  # letters of a name in a plot
STYLE: dict[Any, Any] = {  # Any, because matplotlib's type for a key lists every setting there is
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"], "font.size": 9,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": "#9a9a9a", "grid.alpha": 0.25, "grid.linewidth": 0.6, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "legend.labelcolor": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",  # text stays text: it can be searched, and read out
    "svg.hashsalt": "peft_jax",  # the same records give the same bytes
}  # fmt: skip
# Okabe and Ito's colours, told apart by the colour-blind, without black and yellow, the light ones darkened to be seen
# as lines on white and on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#2e9bd6", "#c98500", "#7d7d7d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":")


class Style(NamedTuple):
    colour: str
    marker: str
    dash: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each name, no two alike among the first 56, so that it is the same in every plot."""
    return {name: Style(COLOURS[at % 7], MARKERS[at % 8], DASHES[at // 7 % 4])
            for at, name in enumerate(dict.fromkeys(names))}  # fmt: skip


def new_figure(title: str, width: float = 7.2, height: float = 4.6, panels: int = 1,
               stacked: bool = False) -> tuple[Figure, list[Axes]]:  # fmt: skip
    """A figure of ``width`` x ``height`` inches and its axes, side by side with one y axis, or stacked with one x."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, wspace=0.02), dpi=DPI)
    FigureCanvasAgg(figure)
    down, across = (panels, 1) if stacked else (1, panels)
    axes = figure.subplots(down, across, sharex=stacked, sharey=not stacked, squeeze=False).ravel()
    lines = [textwrap.fill(line, int(width * 11)) for line in printable(title, "\n").split("\n")]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure, list(axes)


def height_for(names: int) -> float:
    """The height of a figure, in inches, in which so many names find a place."""
    return max(4.6, 1.2 + 0.2 * names)


def plot_label(text: str) -> str:
    """A name as a plot shows it."""
    return shortened(text, LONGEST)


def slug(text: str) -> str:
    """
    >>> slug("forgetting-../<b>/news")
    'forgetting-..-b-news'
    """
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)[:80]


def logarithmic(axis: XAxis | YAxis) -> None:
    """A logarithmic axis with ticks that a person reads: 10 k, not a power of ten."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value)))
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_view_interval()
    if low > 0 and math.log10(high / low) < 1.5:  # too few whole powers to read by
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def png(figure: Figure) -> bytes:
    return _saved(figure, format="png", dpi=DPI, facecolor="white")


def svg(figure: Figure) -> str:
    return _saved(figure, format="svg", facecolor="white", metadata={"Date": None}).decode()


def _saved(figure: Figure, **options) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, **options)
    return out.getvalue()


def leave_room(axes: Axes) -> None:
    """Limits with room for names around the points; of a single point, or of equal ones, too."""
    for axis, (low, high) in (("x", axes.dataLim.intervalx), ("y", axes.dataLim.intervaly)):
        if getattr(axes, f"get_{axis}scale")() == "log":
            factor = max(1.5, (high / low) ** 0.14)
            axes.set(**{f"{axis}lim": (low / factor, high * factor)})
        else:
            room = max(0.14 * (high - low), 0.05 * max(abs(low), abs(high)), 1e-3)
            axes.set(**{f"{axis}lim": (low - room, high + room)})


def bars(axes: Axes, places: Sequence[float], values: Sequence[Spread], wide: float, colour: str, label: str,
         hatch: str | None = None, scale: float = 1) -> None:
    """Level bars with their spread and the number at their end; ``values`` are drawn times ``scale``."""
    means, stds = [scale * value.mean for value in values], [scale * (value.std or 0) for value in values]
    axes.barh(places, means, wide, xerr=stds, color=colour, hatch=hatch, edgecolor="white", linewidth=0,
              label=plot_label(label) if label else None, error_kw={"elinewidth": 1, "ecolor": GREY})  # fmt: skip
    for place, mean, std in zip(places, means, stds):
        axes.annotate(three_digits(mean), (max(mean, 0) + std, place), (3, 0), textcoords="offset points",
                      va="center_baseline", fontsize=8)  # fmt: skip
    axes.set_xlim(min(0, axes.dataLim.x0), axes.dataLim.x1 * 1.2)


def name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Write beside level bars what they are of, the first on top."""
    axes.set(yticks=range(len(names)), ylim=(len(names) - 0.4, -0.6))
    axes.set_yticklabels([shortened(text, 48) for text in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
