"""One page that a person opens without a server: what was run, the table, the plots, every run, what failed.

Everything is in the one file: SVG and style inline, nothing fetched, no script. The template escapes all text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from peft_jax.studies.comparison.columns import NOTE, TEXT, Column, cell, columns, heading
from peft_jax.studies.comparison.formatting import TITLES, printable, three_digits
from peft_jax.studies.comparison.plot_style import INK
from peft_jax.studies.comparison.plots import Plot
from peft_jax.studies.comparison.rows import Row, failures, rows
from peft_jax.studies.comparison.runs import Run, nested, run_of
from peft_jax.studies.comparison.table import failure


def page(records: Iterable[Mapping[str, Any]], plots: Sequence[Plot], command: str = "") -> str:
    """The page of ``records``, with ``plots`` as ``report.drawings`` makes them and the command that made it all."""
    runs = [run_of(record) for record in records]
    table_rows = rows(runs)
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=_without_controls,
                        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return pages.get_template("page.html.jinja").render(
        title=heading(table_rows) if table_rows else "No run finished", runs=runs, rows=table_rows,
        failed=failures(runs), facts=_facts(runs, command), tables=columns(table_rows) if table_rows else {},
        text_columns=TEXT, note=NOTE, plots=plots, cell_parts=cell_parts, inline_svg=inline_svg, outcome=outcome,
        record_text=record_text, failure=failure)  # fmt: skip


def _without_controls(value: Any) -> Any:
    """What the template is about to write, without control characters; markup as it is."""
    return value if isinstance(value, Markup) else printable(str(value), "\n")


def _facts(runs: Sequence[Run], command: str) -> dict[str, list[str]]:
    """What the records say of themselves, each thing once; failed runs say it only where no other does."""
    runs = [run for run in runs if run.finished] or runs
    return {"model": _distinct(runs, _model), "data": _distinct(runs, _data),
            "budget": _distinct(runs, lambda run: run.budget),
            "metric": _distinct(runs, lambda run: TITLES.get(run.metric, run.metric)),
            "command": [command] if command else [], "machine": _distinct(runs, _machine),
            "versions": _distinct(runs, _versions), "when": _when(runs), "time": _time(runs)}  # fmt: skip


def _distinct(runs: Sequence[Run], text: Callable[[Run], str]) -> list[str]:
    return [value for value in dict.fromkeys(map(text, runs)) if value]


def _model(run: Run) -> str:
    sha = _meta_info(run, "model_info").get("sha")
    return f"{run.model} ({sha})" if sha else run.model


def _data(run: Run) -> str:
    return ", ".join(map(str, _meta_info(run, "dataset_info")))


def _machine(run: Run) -> str:
    system = _meta_info(run, "system_info")
    parts = [system.get(key) for key in ("accelerator", "gpu", "processor", "machine", "system", "release")]
    return ", ".join(dict.fromkeys(str(part) for part in parts if part))


def _versions(run: Run) -> str:
    packages = _meta_info(run, "package_info").items()
    return ", ".join(f"{key.removesuffix('-version')} {value}" for key, value in packages
                     if value and str(key).endswith("-version"))  # fmt: skip


def _meta_info(run: Run, section: str) -> Mapping[str, Any]:
    value = nested(run.record, "meta_info", section)
    return value if isinstance(value, Mapping) else {}


def _when(runs: Sequence[Run]) -> list[str]:
    times = sorted(str(time) for run in runs if (time := nested(run.record, "run_info", "created_at")))
    return [" to ".join(dict.fromkeys([times[0], times[-1]]))] if times else []


def _time(runs: Sequence[Run]) -> list[str]:
    seconds = sum({_training(run): run.values.get("seconds", 0) for run in runs}.values())
    return [f"{three_digits(seconds / 60)} minutes of training in all"] if seconds else []


def _training(run: Run) -> tuple[str, str]:
    """What tells one training from others: the run that was chosen has a record of its own, but was trained once."""
    return run.label, str(nested(run.record, "peft_jax", "cell", "settings") or run.name)


def cell_parts(row: Row, column: Column) -> list[str]:
    """A cell in parts: where room is short a line may end before ± and before a bracket, never inside a number."""
    return [cell(row, column)] if column.key in TEXT else re.split(r" (?=±|\()", cell(row, column))


def inline_svg(plot: Plot) -> Markup:
    """The SVG without its prolog and its white ground, in the page's text colour, its ids made its own."""
    svg = plot.svg[plot.svg.index("<svg"):].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # what matplotlib draws first
    svg = re.sub(r'( id="|url\(#|href="#)', lambda match: f"{match.group()}{escape(plot.name)}-", svg)
    label = escape(printable(plot.caption, "\n"))
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def outcome(run: Run) -> str:
    """
    >>> outcome(run_of({"run_info": {"experiment_name": "lora/a"}, "train_info": {"status": "failed"}}))
    'failed'
    """
    measured = run.finished and run.measured_on
    text = f"{run.values['value']:.3f} on {run.measured_on}" if measured else run.status
    return text + (", chosen" if run.chosen else "")


def record_text(run: Run) -> str:
    """The record of a run as JSON, without its long lists."""
    return json.dumps(_brief(run.record), indent=1, default=str)


def _brief(record: Any) -> Any:
    if isinstance(record, Mapping):
        return {key: _brief(value) for key, value in record.items() if key != "pytorch_info"}
    if isinstance(record, list) and len(record) > 12:
        return f"{len(record)} values, in the run's own file"
    return [_brief(value) for value in record] if isinstance(record, list) else record
