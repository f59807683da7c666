"""One page that a person opens without a server: what was run, the table, the plots, every run, what failed.

Everything is in the one file: SVG and style inline, nothing fetched, no script. All text is escaped.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from peft_jax.studies.comparison.columns import NOTE, TEXT, Column, cell, columns, heading
from peft_jax.studies.comparison.draw import INK
from peft_jax.studies.comparison.page import FOOT, HEAD, STYLE
from peft_jax.studies.comparison.plots import Plot
from peft_jax.studies.comparison.rows import Row, failures, rows
from peft_jax.studies.comparison.runs import Run, dig, run_of
from peft_jax.studies.comparison.table import failure
from peft_jax.studies.comparison.words import TITLES, printable, three


def page(records: Iterable[Mapping[str, Any]], plots: Sequence[Plot], command: str = "") -> str:
    """The page of ``records``, with ``plots`` as ``report.drawings`` makes them and the command that made it all."""
    runs = [run_of(record) for record in records]
    found, failed = rows(runs), failures(runs)
    title = heading(found) if found else "No run finished"
    parts = [f"<h1>{_text(title[:1].upper() + title[1:])}</h1>", _counts(runs, found, failed),
             _section("what", "What was run", _facts(runs, command)), _section("table", "Table", _tables(found)),
             _section("plots", "Plots", _plots(plots)), _section("runs", "Every run", "\n".join(map(_details, runs))),
             _section("failures", "What failed", _failures(failed))]  # fmt: skip
    return HEAD.format(title=_text(title), style=STYLE) + "\n".join(parts) + FOOT


def _text(value: Any) -> str:
    """
    >>> _text("<b> & \\x1b")
    '&lt;b&gt; &amp;  '
    """
    return escape(printable(str(value), "\n"))


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n{body}\n</section>'


def _counts(runs, found, failed) -> str:
    bad = f', <a class="bad" href="#failures">{len(failed)} not finished</a>' if failed else ""
    return f'<p class="faint">{len(runs)} runs, {len(found)} rows{bad}.</p>'


def _facts(runs: Sequence[Run], command: str) -> str:
    """What the records say of themselves, each thing once; failed runs say it only where no other does."""
    runs = [run for run in runs if run.finished] or runs
    facts = [("model", _each(runs, _model)), ("data", _each(runs, _data)),
             ("budget", _each(runs, lambda run: run.budget)),
             ("metric", _each(runs, lambda run: TITLES.get(run.metric, run.metric))),
             ("command", f"<code>{_text(command)}</code>" if command else ""), ("machine", _each(runs, _machine)),
             ("versions", _each(runs, _versions)), ("when", _when(runs)), ("time", _time(runs))]  # fmt: skip
    lines = [f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts if value]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>"


def _each(runs: Sequence[Run], words) -> str:
    return "<br>".join(_text(value) for value in dict.fromkeys(map(words, runs)) if value)


def _model(run: Run) -> str:
    sha = _keys(run, "model_info").get("sha")
    return f"{run.model} ({sha})" if sha else run.model


def _data(run: Run) -> str:
    return ", ".join(map(str, _keys(run, "dataset_info")))


def _machine(run: Run) -> str:
    system = _keys(run, "system_info")
    parts = [system.get(key) for key in ("accelerator", "gpu", "processor", "machine", "system", "release")]
    return ", ".join(dict.fromkeys(str(part) for part in parts if part))


def _versions(run: Run) -> str:
    return ", ".join(f"{key.removesuffix('-version')} {value}" for key, value in _keys(run, "package_info").items()
                     if value and str(key).endswith("-version"))  # fmt: skip


def _keys(run: Run, section: str) -> Mapping[str, Any]:
    found = dig(run.record, "meta_info", section)
    return found if isinstance(found, Mapping) else {}


def _when(runs: Sequence[Run]) -> str:
    times = sorted(str(time) for run in runs if (time := dig(run.record, "run_info", "created_at")))
    return _text(" to ".join(dict.fromkeys([times[0], times[-1]]))) if times else ""


def _time(runs: Sequence[Run]) -> str:
    seconds = sum({_training(run): run.values.get("seconds", 0) for run in runs}.values())
    return f"{three(seconds / 60)} minutes of training in all" if seconds else ""


def _training(run: Run) -> tuple[str, str]:
    """What tells one training from others: the run that was chosen has a record of its own, but was trained once."""
    return run.label, str(dig(run.record, "peft_jax", "cell", "settings") or run.name)


def _tables(found: Sequence[Row]) -> str:
    if not found:
        return "<p>No run finished.</p>"
    return "\n".join([*(_table(found, kind, title) for title, kind in columns(found).items()),
                      f'<p class="faint">{_text(NOTE)}</p>'])  # fmt: skip


def _table(found: Sequence[Row], kind: Sequence[Column], caption: str) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in ("method", "n", *(one.heading for one in kind)))
    cells = ["".join(f"<td>{_cell(row, column)}</td>" for column in kind) for row in found]
    body = "\n".join(f'<tr><th scope="row">{_text(row.name)}</th><td>{len(row.runs)}</td>{numbers}</tr>'
                     for row, numbers in zip(found, cells))  # fmt: skip
    return (f'<div class="scroll"><table class="rows"><caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{body}\n</tbody></table></div>")  # fmt: skip


def _cell(row: Row, column: Column) -> str:
    """Where room is short a line may end before ± and before a bracket, never inside a number."""
    if column.key in TEXT:
        return _text(cell(row, column))
    parts = re.split(r" (?=±|\()", cell(row, column))
    return " ".join(f"<span>{_text(part)}</span>" for part in parts)


def _plots(plots: Sequence[Plot]) -> str:
    drawn = "\n".join(f'<figure id="plot-{_text(plot.name)}">{_inline(plot)}\n<figcaption>{_text(plot.caption)}'
                      "</figcaption></figure>" for plot in plots)  # fmt: skip
    return f'<div class="plots">\n{drawn}\n</div>' if drawn else "<p>Nothing was measured that can be drawn.</p>"


def _inline(plot: Plot) -> str:
    """The SVG without its prolog and its white ground, in the page's text colour, its ids made its own."""
    svg = plot.svg[plot.svg.index("<svg"):].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="patch_1">.*?</g>', "", svg, count=1, flags=re.DOTALL)  # what matplotlib draws first
    svg = re.sub(r'( id="|url\(#|href="#)', lambda found: f"{found.group()}{_text(plot.name)}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{_text(plot.caption)}" ', 1)


def _details(run: Run) -> str:
    told = f"{run.values['value']:.3f} on {run.measured_on}" if run.finished and run.measured_on else run.status
    told += ", chosen" if run.chosen else ""
    look = "faint" if run.finished else "bad"
    body = _text(json.dumps(_brief(run.record), indent=1, default=str))
    return (f'<details><summary>{_text(run.name)} <span class="{look}">{_text(told)}</span></summary>'
            f"<pre>{body}</pre></details>")  # fmt: skip


def _brief(record: Any) -> Any:
    """A record without its long lists."""
    if isinstance(record, Mapping):
        return {key: _brief(value) for key, value in record.items() if key != "pytorch_info"}
    if isinstance(record, list) and len(record) > 12:
        return f"{len(record)} values, in the run's own file"
    return [_brief(value) for value in record] if isinstance(record, list) else record


def _failures(failed: Sequence[Run]) -> str:
    if not failed:
        return "<p>Nothing.</p>"
    body = "\n".join(f'<tr><th scope="row">{_text(run.name)}</th><td class="bad">{_text(failure(run))}</td></tr>'
                     for run in failed)  # fmt: skip
    return f'<div class="scroll"><table class="why"><tbody>\n{body}\n</tbody></table></div>'
