"""A comparison as files: tables, plots, one page."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core import files
from peft_jax.studies.comparison import html_page, plot_style, table
from peft_jax.studies.comparison.ablation_plots import ablations
from peft_jax.studies.comparison.formatting import short_name
from peft_jax.studies.comparison.plots import Plot, comparison_plots
from peft_jax.studies.comparison.rows import Row, rows
from peft_jax.studies.comparison.runs import Run, run_of


def report(folder: Path, records: Iterable[Mapping[str, Any]], command: str = "") -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``table.json``, ``plots/*.svg``, ``plots/*.png`` and ``report.html``.

    ``command`` is what made the records, for the page and ``table.json``. Returns the paths. Raises ``PeftJaxError``
    where a record is damaged (``record.read`` gives none such).
    """
    records = list(records)
    plots = drawings([run_of(record) for record in records])
    texts = {"table.md": table.markdown(records), "table.csv": table.csv_table(records),
             "table.json": json.dumps(table.summary(records, command), indent=1) + "\n",
             **{f"plots/{plot.name}.svg": plot.svg for plot in plots},
             **{f"plots/{plot.name}.png": plot.png for plot in plots},
             "report.html": html_page.page(records, plots, command)}  # fmt: skip
    (Path(folder) / "plots").mkdir(parents=True, exist_ok=True)
    for name, data in texts.items():
        files.write(Path(folder) / name, data)
    return [Path(folder) / name for name in texts]


def drawings(runs: Sequence[Run]) -> list[Plot]:
    """All plots, no two of one name. What was not measured alike (metric, model, budget) is not drawn together."""
    table_rows = rows(runs)
    styles = plot_style.styles([*(row.name for row in table_rows), *(run.label for run in runs)])
    comparable: dict[tuple, list[Row]] = {}
    for row in table_rows:
        comparable.setdefault((row.metric, row.model, row.budget), []).append(row)
    comparisons = []
    for (_, model, _), group in comparable.items():
        suffix = plot_style.slug(f"-{short_name(model)}") if len(comparable) > 1 else ""
        comparisons += [plot._replace(name=plot.name + suffix) for plot in comparison_plots(group, styles)]
    return _named_apart([*comparisons, *ablations(runs, styles)])


def _named_apart(drawings: Sequence[Plot]) -> list[Plot]:
    names = [plot.name for plot in drawings]
    return [plot._replace(name=f"{plot.name}-{at}") if names.index(plot.name) < at else plot
            for at, plot in enumerate(drawings)]  # fmt: skip
