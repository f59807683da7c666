"""Runs compared: records of runs in; tables, plots and an HTML page out. Pure data: nothing here knows jax or a model.

    record.py            one JSON file a run, in the shape of Hugging Face peft's method_comparison results, theirs too
    runs.py              a record as a ``Run``: the numbers under one name each, whoever wrote it
    rows.py              runs over seeds as ``Row``: mean, sample standard deviation, n
    columns.py           which numbers a table shows, and how; formatting.py numbers and names as a person reads them
    table.py             terminal, Markdown, CSV, the summary of table.json
    plot_style.py        colours, bars, SVG and PNG; label_placement.py names that keep off each other
    plots.py             what is drawn of a comparison; ablation_plots.py of an ablation
    html_page.py         one page without a server; page.html.jinja its template
    report.py            all of it into a folder
"""

from peft_jax.studies.comparison.record import read, write
from peft_jax.studies.comparison.report import report
from peft_jax.studies.comparison.rows import rows
from peft_jax.studies.comparison.runs import run_of
from peft_jax.studies.comparison.table import csv_table, markdown, summary, terminal

__all__ = ["csv_table", "markdown", "read", "report", "rows", "run_of", "summary", "terminal", "write"]
