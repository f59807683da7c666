"""Rows as text: for the terminal, as Markdown, as CSV, and as the summary that ``table.json`` holds."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from peft_jax.studies.comparison.columns import NOTE, Column, cell, columns, heading
from peft_jax.studies.comparison.formatting import printable, shortened
from peft_jax.studies.comparison.rows import Row, failures, rows
from peft_jax.studies.comparison.runs import Run, run_of

WIDTH = 80
LONGEST = 40  # of a name in the terminal
Records = Iterable[Mapping[str, Any]]


def terminal(records: Records) -> str:
    """Tables of at most 80 columns: as many as the numbers need, each with the methods in front; failures below."""
    runs = [run_of(record) for record in records]
    blocks, failed = [], failures(runs)
    if table_rows := rows(runs):
        tables = [part for kind in columns(table_rows).values() for part in _parts(table_rows, kind)]
        head, note = (textwrap.fill(text, WIDTH) for text in (printable(heading(table_rows)), NOTE))
        blocks = [head, *(_block(table_rows, part) for part in tables), note]
    if failed:
        lines = [textwrap.fill(shortened(f"{run.name}: {failure(run)}", 2 * WIDTH - 4), WIDTH, subsequent_indent="  ")
                 for run in failed]
        blocks.append("\n".join(["Not finished:", *lines]))
    return "\n\n".join(blocks)


def failure(run: Run) -> str:
    """Why a run is no row, in one line."""
    return " ".join(f"{run.status}: {run.error}".split()) if run.error else run.status


def _cells(table_rows: Sequence[Row], part: Sequence[Column]) -> list[list[str]]:
    """Head and body; the name and the number of runs in front."""
    head = ["method", "n", *(column.heading for column in part)]
    return [head, *([row.name, str(len(row.runs)), *(cell(row, column) for column in part)] for row in table_rows)]


def _parts(table_rows: Sequence[Row], kind: Sequence[Column]) -> list[list[Column]]:
    """The columns of one table, cut into as few as fit the width, those as narrow as they may be."""
    front = sum(min(LONGEST, max(map(len, names))) + 2 for names in zip(*_cells(table_rows, [])))
    widths = [max(len(line[-1]) for line in _cells(table_rows, [column])) + 2 for column in kind]
    fewest = len(_filled(kind, widths, WIDTH + 2 - front))  # the last column needs no gap
    return next(parts for room in range(WIDTH + 3 - front)
                if len(parts := _filled(kind, widths, room)) == fewest)  # fmt: skip


def _filled(kind: Sequence[Column], widths: Sequence[int], room: int) -> list[list[Column]]:
    """The columns in order, as many to a part as ``room`` takes, at least one."""
    parts, used = [], room + 1
    for column, width in zip(kind, widths):
        if used + width > room:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += width
    return parts


def _block(table_rows: Sequence[Row], part: Sequence[Column]) -> str:
    lines = [[shortened(line[0], LONGEST), *line[1:]] for line in _cells(table_rows, part)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([line[0].ljust(widths[0]), *(one.rjust(width) for one, width in zip(line[1:], widths[1:]))])
            for line in lines]  # fmt: skip
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def markdown(records: Records) -> str:
    """A table each of what was learnt, what it cost, how fast it is, and what did not finish."""
    runs = [run_of(record) for record in records]
    blocks, failed = [], failures(runs)
    if table_rows := rows(runs):
        tables = [_markdown(_cells(table_rows, kind)) for kind in columns(table_rows).values()]
        blocks = [f"**{_escaped(heading(table_rows))}**", *tables, NOTE]
    if failed:
        blocks.append(_markdown([["not finished", "why"], *([run.name, failure(run)] for run in failed)], "---|"))
    return "\n\n".join(blocks) + "\n"


def _markdown(lines: Sequence[Sequence[str]], rule: str = "---:|") -> str:
    head, *body = (f"| {' | '.join(map(_escaped, line))} |" for line in lines)
    return "\n".join([head, f"|---|{rule * (len(lines[0]) - 1)}", *body])


def _escaped(text: str) -> str:
    r"""
    >>> _escaped("a|b <i>*")
    'a\\|b &lt;i&gt;\\*'
    """
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{one}" if one in "|*_`[]\\" else one for one in text)


FACTS = ("method", "status", "runs", "metric", "measured_on", "model", "budget")


def csv_table(records: Records) -> str:
    """One line a row, then one a run that did not finish, at full precision: seconds, bytes, parameters; each number
    as ``<key>.mean``, ``.std``, ``.n`` (see ``runs.values_of`` for the keys), empty where it was not measured."""
    runs = [run_of(record) for record in records]
    table_rows, failed = rows(runs), failures(runs)
    facts = [(row.name, "success", len(row.runs), row.metric, row.measured_on, row.model, row.budget)
             for row in table_rows]  # fmt: skip
    facts += [(run.name, run.status, 1, run.metric, "", run.model, run.budget) for run in failed]
    numbers = [{f"{key}.{part}": number for key, spread in row.values.items()
                for part, number in spread._asdict().items()} for row in table_rows]  # fmt: skip
    table = pd.DataFrame(facts, columns=FACTS).join(pd.DataFrame(numbers, dtype=object))  # a count stays whole
    return table.assign(error=[""] * len(table_rows) + [run.error for run in failed]).to_csv(index=False)


def summary(records: Records, command: str = "") -> dict[str, Any]:
    """What ``table.json`` holds: rows with full precision, for programs. What was not measured is not there.

    Returns {"command", "model": of all rows or null, "rows": [{"method", "metric", "measured_on", "n",
    "value", "gain", "loss", "general" (loss of general text), "before", "before.loss", "before.general" (before
    training): {"mean", "std", "n"}, "forgetting", "neighbours": {name: {"mean", "std", "n"}},
    "latency": {"prefill", "token", "merged_prefill", "merged_token"} as ratios to the base, "memory": {"observed",
    "compiled"} in bytes, "adapter_bytes", "trainable", "all", "rate"}], "failed": [{"name", "status", "error"}]}.
    """
    runs = [run_of(record) for record in records]
    table_rows = rows(runs)
    models = {row.model for row in table_rows}
    return {"command": command, "model": models.pop() if len(models) == 1 else None,
            "rows": [_summary(row) for row in table_rows],
            "failed": [{"name": run.name, "status": run.status, "error": run.error} for run in failures(runs)],
            }  # fmt: skip


SPREADS = ("value", "gain", "loss", "general", "before", "before.loss", "before.general")
MEANS = ("trainable", "all", "rate", "adapter_bytes", "tokens_per_second")
LATENCIES = {"prefill": "ratio.unmerged.prefill", "token": "ratio.unmerged.token",
             "merged_prefill": "ratio.merged.prefill", "merged_token": "ratio.merged.token"}  # fmt: skip
MEMORY = {"observed": "memory.observed", "compiled": "memory.compiled"}


def _summary(row: Row) -> dict[str, Any]:
    facts = {"method": row.name, "metric": row.metric, "measured_on": row.measured_on, "n": len(row.runs)}
    spreads = {key: row.values[key]._asdict() for key in SPREADS if key in row.values}
    return {**facts, **spreads, "forgetting": _under(row, "forgetting."), "neighbours": _under(row, "neighbour."),
            "latency": _means(row, LATENCIES), "memory": _means(row, MEMORY),
            **_means(row, {key: key for key in MEANS})}  # fmt: skip


def _under(row: Row, start: str) -> dict[str, Any]:
    return {key.removeprefix(start): value._asdict() for key, value in row.values.items() if key.startswith(start)}


def _means(row: Row, keys: Mapping[str, str]) -> dict[str, float]:
    return {name: row.values[key].mean for name, key in keys.items() if key in row.values}
