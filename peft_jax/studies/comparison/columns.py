"""Which numbers of a row a table shows, and how. Files for people round; CSV and table.json do not."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft_jax.studies.comparison.formatting import TITLES, short_name, three_digits
from peft_jax.studies.comparison.rows import Row, Spread

TEXT = ("model", "budget", "metric")  # columns of text, shown where the rows differ


class Column(NamedTuple):
    """key: of ``Row.values``, or a field of ``Row`` that is text. show(value, like): a number for people, rounded as
    ``like`` would be. ratio: the key of the same, to the base model's."""

    key: str
    heading: str
    show: Callable[[float, float], str] = three_digits
    ratio: str = ""


def _signed(value: float, like: float) -> str:
    return f"{value:+.3f}"


def _decimals(value: float, like: float) -> str:
    return f"{value:.3f}"


def _count(value: float, like: float) -> str:
    return f"{value:,.0f}"


def _plain(value: float, like: float) -> str:
    return f"{value:g}"


def _scaled(factor: float) -> Callable[[float, float], str]:
    return lambda value, like: three_digits(value / factor, like / factor)


def learnt(rows: Sequence[Row]) -> list[Column]:
    """What a method learnt, and what it forgot for it; sources and tasks as the rows have them."""
    return [
        *(Column(name, name) for name in ("model", "budget") if len({getattr(row, name) for row in rows}) > 1),
        *([Column("metric", "of")] if len({row.metric for row in rows}) > 1 else []),
        Column("before", "before", _decimals), Column("value", "metric", _decimals), Column("gain", "gain", _signed),
        *(Column(key, f"forgot {key.partition('.')[2]}", _signed) for key in _keys(rows, "forgetting.")),
        *(Column(key, f"change {key.partition('.')[2]}", _signed) for key in _keys(rows, "neighbour.")),
        Column("rate", "rate", _plain),
    ]  # fmt: skip


LOSSES = [
    Column("before.loss", "answers, before", _decimals), Column("loss", "answers", _decimals),
    Column("before.general", "general text, before", _decimals), Column("general", "general text", _decimals),
]  # fmt: skip
COST = [
    Column("trainable", "trainable", _count), Column("share", "% of all", three_digits),
    Column("memory", "memory (GB)", _scaled(1e9)), Column("memory.observed", "observed (GB)", _scaled(1e9)),
    Column("tokens_per_second", "tokens/s", _count), Column("adapter_bytes", "adapter (MB)", _scaled(1e6)),
]  # fmt: skip
LATENCY = [
    *(Column(f"latency.{state}.{phase}", f"{phase}, {state} (ms)", _scaled(1e-3), f"ratio.{state}.{phase}")
      for state in ("unmerged", "merged") for phase in ("prefill", "token")),
]  # fmt: skip

NOTE = """metric: higher is better. gain: metric on test minus that of the base model on the same
examples. before: before training. answers: loss of held-out answers; general text: loss of
text that is not of the task. forgot: loss on general text, after training minus before, nats
per token (more is worse). change: the metric on a neighbouring task, after minus before.
rate: the learning rate. memory: what the compiled training step needs, or what was observed where
a record says no more. observed: the peak while training, which is higher where the step had to be
compiled first. (×): as a multiple of the base model's. ±: sample standard deviation over seeds; n of them."""


def columns(rows: Sequence[Row]) -> dict[str, list[Column]]:
    """The columns of each table, under its title, without those that no row has and without empty tables."""
    keys = {key for row in rows for key in row.values} | set(TEXT)
    kinds = {"What was learnt, and what was forgotten for it": learnt(rows), "Loss (nats per token)": LOSSES,
             "What it cost": COST, "How fast it is in use": LATENCY}  # fmt: skip
    tables = {title: [column for column in kind if column.key in keys] for title, kind in kinds.items()}
    return {title: kind for title, kind in tables.items() if kind}


def _keys(rows: Sequence[Row], start: str) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row.values if key.startswith(start)))


def cell(row: Row, column: Column) -> str:
    """A number with its spread; how many runs have it where that is not all; its ratio to the base."""
    if column.key in TEXT:
        return TITLES.get(text := getattr(row, column.key), short_name(text)) or "–"
    if column.key not in row.values:
        return "–"
    text = spread_words(row.values[column.key], column.show, len(row.runs))
    on = " (validation)" if column.key == "value" and row.measured_on == "validation" else ""
    ratio = f" ({row.values[column.ratio].mean:.2f}×)" if column.ratio in row.values else ""
    return text + on + ratio


def spread_words(value: Spread, show: Callable[[float, float], str], runs: int) -> str:
    """
    >>> spread_words(Spread(0.5, 0.0123, 2), _decimals, 3), spread_words(Spread(1e6, 0.0, 3), _count, 3)
    ('0.500 ± 0.012 (2 of 3)', '1,000,000')
    """
    std = f" ± {show(value.std, value.mean).lstrip('+')}" if value.std else ""
    return f"{show(value.mean, value.mean)}{std}" + (f" ({value.n} of {runs})" if value.n < runs else "")


def heading(rows: Sequence[Row]) -> str:
    """What was measured of which model in which budget, where the rows agree on it."""
    metrics, models, budgets = (list(dict.fromkeys(getattr(row, name) for row in rows))
                                for name in ("metric", "model", "budget"))  # fmt: skip
    metric = " / ".join(TITLES.get(name) or name for name in metrics)
    model = short_name(models[0]) if len(models) == 1 else f"{len(models)} models"
    budget = f" after {budgets[0]}" if len(budgets) == 1 and budgets[0] else ""
    return f"{metric} of {model}{budget}"
