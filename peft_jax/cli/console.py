"""What a run tells a person: parameter counts, progress, the table at the end. All of it fits 80 columns."""

from collections.abc import Mapping
from typing import Any

from peft_jax.core import tree
from peft_jax.method import Method
from peft_jax.train.progress import duration


def parameter_counts(method: Method, base: tree.Tree, params: tree.Tree) -> tuple[int, int]:
    """(trainable, all) parameters as Hugging Face peft counts them.

    Zeros that only fill up a stack and constants beside the weights (scalings) are no parameters.
    """
    trainable = tree.flatten(tree.partition(params, method.labels(params))[0])
    added = {path: leaf for path, leaf in trainable.items() if path not in tree.flatten(base)}
    padding = method.padding(params)
    return tree.count(trainable) - padding, tree.count(base) + tree.count(added) - padding


def parameter_line(trainable: int, total: int) -> str:
    """Hugging Face peft's line.

    >>> parameter_line(921_600, 135_436_608)
    'trainable params: 921,600 || all params: 135,436,608 || trainable%: 0.6805'
    """
    share = 100 * trainable / total
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


# What the table at the end of a run is made of.
SHOWN = ("before", "after", "trainable", "all", "seconds", "steps", "peak_memory", "adapter", "adapter_bytes")


def summary(results: Mapping[str, Any]) -> str:
    """The table at the end of a run: metrics before and after, then what it cost. ``results`` has all of ``SHOWN``."""
    cost = [
        ("trainable", f"{100 * results['trainable'] / results['all']:.4f} %"),
        ("train time", f"{duration(results['seconds'])} ({results['steps']} steps)"),
        ("peak memory", " + ".join(f"{size(value)} {where}" for where, value in results["peak_memory"].items())),
        ("saved", f"{size(results['adapter_bytes'])}  {results['adapter']}"),
    ]
    columns = {name: results[name] for name in ("before", "after") if results[name]}
    return "\n".join((metrics_table(columns), "", *(f"{name:<{NAMES}}{value}" for name, value in cost)))


NAMES = 34  # columns of a terminal, of the names in a table
# What evaluation may report, and what a person calls it.
TITLES = {
    "exact": "exact match of the generated word",
    "among_choices": "accuracy among the choices",
    "accuracy": "accuracy",
    "spearman": "rank correlation with people",
    "loss": "held-out loss (nats per token)",
    "perplexity": "held-out perplexity",
    "text_loss": "held-out loss (nats per text)",
    "rmse": "held-out error (root mean sq.)",
    "probe_loss": "general text, loss",
    "probe_perplexity": "general text, perplexity",
}


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics as rows, ``{"before": {metric: value}, "after": ...}`` as columns; more than fit 80 as tables below each
    other, each with the metrics that its columns have."""
    parts: list[dict[str, Mapping[str, float]]] = [{}]
    for name, column in columns.items():
        if parts[-1] and NAMES + sum(map(_wide, (*parts[-1], name))) > 80:
            parts.append({})
        parts[-1][name] = column
    return "\n\n".join(map(_one_table, parts))


def _wide(name: str) -> int:
    return max(12, len(name) + 2)


def _one_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    head = " " * NAMES + "".join(f"{name:>{_wide(name)}}" for name in columns)
    metrics = dict.fromkeys(metric for column in columns.values() for metric in column)
    rows = [f"{TITLES[metric]:<{NAMES}}" + "".join(
        f"{column[metric]:>{_wide(name)}.3f}" if metric in column else " " * _wide(name)
        for name, column in columns.items()) for metric in metrics]
    return "\n".join((head, "-" * len(head), *rows))


def answers(prompt: str, texts: Mapping[str, str]) -> str:
    """A prompt and what each model made of it.

    >>> print(answers("2 + 2 is", {"base": " 5.", "adapter": " 4."}), end="")
    2 + 2 is
      base:    '5.'
      adapter: '4.'
    """
    width = max(map(len, texts)) + 2
    return "\n".join((prompt, *(f"  {name + ':':<{width}}{text.strip()!r}" for name, text in texts.items()), ""))


def metrics_line(step: int, metrics: Mapping[str, float]) -> str:
    """
    >>> metrics_line(40, {"loss": 0.5331, "exact": 0.5})
    'evaluated after step 40: loss 0.533, exact 0.500'
    """
    return f"evaluated after step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())


def size(count: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> size(3_700_000), size(950)
    ('3.7 MB', '950 B')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


