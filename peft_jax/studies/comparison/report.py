"""A comparison as files: tables, plots, one page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core import files
from peft_jax.studies.comparison import draw, html, table
from peft_jax.studies.comparison.ablation import ablations
from peft_jax.studies.comparison.plots import Plot, plots
from peft_jax.studies.comparison.rows import Row, rows
from peft_jax.studies.comparison.runs import Run, run_of
from peft_jax.studies.comparison.words import short


def report(folder: Path, records: Iterable[Mapping[str, Any]], command: str = "") -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``table.json``, ``plots/*.svg``, ``plots/*.png`` and ``report.html``.

    ``command`` is what made the records, for the page and ``table.json``. Returns the paths. Raises ``PeftJaxError``
    where a record is damaged (``record.read`` gives none such).
    """
    records = list(records)
    drawn = drawings([run_of(record) for record in records])
    texts = {"table.md": table.markdown(records), "table.csv": table.csv_table(records),
             "table.json": json.dumps(table.summary(records, command), indent=1) + "\n",
             **{f"plots/{plot.name}.svg": plot.svg for plot in drawn},
             **{f"plots/{plot.name}.png": plot.png for plot in drawn},
             "report.html": html.page(records, drawn, command)}  # fmt: skip
    (Path(folder) / "plots").mkdir(parents=True, exist_ok=True)
    for name, data in texts.items():
        files.write(Path(folder) / name, data)
    return [Path(folder) / name for name in texts]


def drawings(runs: Sequence[Run]) -> list[Plot]:
    """All plots, no two of one name. What was not measured alike (metric, model, budget) is not drawn together."""
    found = rows(runs)
    look = draw.styles([*(row.name for row in found), *(run.label for run in runs)])
    fields: dict[tuple, list[Row]] = {}
    for row in found:
        fields.setdefault((row.metric, row.model, row.budget), []).append(row)
    made = []
    for (_, model, _), field in fields.items():
        told = f"-{short(model)}" if len(fields) > 1 else ""
        made += [plot._replace(name=f"{plot.name}{draw.slug(told)}") for plot in plots(field, look)]
    return _apart([*made, *ablations(runs, look)])


def _apart(made: Sequence[Plot]) -> list[Plot]:
    names = [plot.name for plot in made]
    return [plot._replace(name=f"{plot.name}-{at}") if names.index(plot.name) < at else plot
            for at, plot in enumerate(made)]  # fmt: skip
