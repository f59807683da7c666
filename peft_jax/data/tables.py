"""Rows of a table as examples, by what their columns hold; and tables of the Hugging Face Hub."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from peft_jax.data.files import without_bars
from peft_jax.errors import PeftJaxError, nearest, needed, root_cause

# Columns whose names say what they hold, for a task that names none. "input" is what an instruction is about.
KNOWN = (
    {"messages": "messages"},
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "question", "completion": "answer"},
    {"prompt": "instruction", "completion": "output"},
    {"prompt": "instruction", "completion": "output", "input": "input"},
    {"prompt": "instruction", "completion": "response"},
    {"prompt": "instruction", "completion": "response", "input": "input"},
    {"prompt": "instruction", "completion": "response", "input": "context"},
    {"text": "text"},
)
LABELLED = {"text": "text", "label": "label"}  # the same where a head tells the label


def read_hub(source: str, subset: str, split: str) -> list[dict]:
    """Rows of one split of a Hub data set; no code of the data set is run.

    Raises:
      PeftJaxError: no such data set, subset or split, no access, or the Hub cannot be reached.
    """
    if not source:
        raise PeftJaxError("task.source is empty: name a data set of the Hugging Face Hub")
    datasets = needed("datasets", "for a data set of the Hugging Face Hub")
    try:
        with without_bars(datasets):
            return datasets.load_dataset(source, subset or None, split=split).to_list()
    except Exception as error:  # requests, hub, fsspec and datasets errors alike
        raise PeftJaxError(
            f"cannot load the data set {source!r} (subset {subset or 'default'}, split {split}) from the Hugging Face "
            f"Hub: {root_cause(error)}; check the names, the network and HF_TOKEN, or use a local file "
            "(task=FILE.jsonl)"
        ) from error


def table_examples(task, rows: Sequence[dict], where: str) -> list[dict]:
    """Rows as examples, by the columns that ``task`` names or, where it names none, by those of ``KNOWN``.

    Raises:
      PeftJaxError: conflicting columns named, none named and none known, a column that does not exist (with the
        nearest), a row without a value.
    """
    columns = columns_of(task, rows[0], where) if rows else {}
    for name in columns.values():
        if rows and name not in rows[0]:
            raise PeftJaxError(f"{where} has no column {name!r}; {nearest(name, rows[0])}")
    return [_table_example(task, columns, row, f"{where} row {number}") for number, row in enumerate(rows, start=1)]


def unused_columns(task, rows: Sequence[dict], where: str) -> tuple[str, ...]:
    """The columns of which :func:`table_examples` takes nothing, in the table's order."""
    used = columns_of(task, rows[0], where).values() if rows else ()
    return tuple(name for name in rows[0] if name not in used) if rows else ()


def columns_of(task, names: Iterable[str], where: str) -> dict[str, str]:
    """What each column is for: as the task names them, or as those of the table are called.

    Raises ``PeftJaxError`` where the task names what does not go together, or where no known use fits the names.
    """
    if named := named_columns(task):
        return named
    if task.answer == "word":
        return known_columns(names, where)
    if missing := [name for name in LABELLED.values() if name not in names]:
        raise PeftJaxError(f"{where} has no column {missing[0]!r}; name those to use with "
                           f"--config.task.text_column and --config.task.label_column, of: {', '.join(names)}")
    return LABELLED


def named_columns(task) -> dict[str, str]:
    """{"prompt", "completion", "messages", "text" or "label": the column's name}, for those that the task names."""
    given = {
        "prompt": task.prompt_column,
        "completion": task.completion_column,
        "messages": task.messages_column,
        "text": task.text_column,
        "label": task.label_column,
    }
    given = {key: name for key, name in given.items() if name}
    if set(given) not in (set(), {"prompt", "completion"}, {"messages"}, {"text"}, {"text", "label"}):
        raise PeftJaxError(
            "name the columns: either task.prompt_column and task.completion_column, or task.messages_column, "
            f"or task.text_column, with task.label_column or without (given: {', '.join(given)})"
        )
    return given


def known_columns(names: Iterable[str], where: str) -> dict[str, str]:
    """The one use of ``KNOWN`` that these columns allow. Raises ``PeftJaxError`` where there is none or a choice."""
    names = list(names)
    fits = [use for use in KNOWN if set(use.values()) <= set(names)]
    fits = [use for use in fits if not any(use.items() < other.items() for other in fits)]
    if len(fits) != 1:
        raise PeftJaxError(
            f"{where}: {'more than one use fits' if fits else 'no known use fits'} the columns {', '.join(names)}; "
            "name those to use with --config.task.prompt_column and --config.task.completion_column, or "
            "--config.task.messages_column, or --config.task.text_column"
        )
    return fits[0]


def _table_example(task, columns: dict[str, str], row: dict, origin: str) -> dict:
    if "messages" in columns:
        return {"messages": _messages(row[columns["messages"]], origin), "origin": origin}
    values: dict[str, Any] = {key: _text(row[name], name, origin) for key, name in columns.items() if key != "input"}
    if "prompt" in values:
        about = f"\n\n{row[columns['input']]}" if "input" in columns and row[columns["input"]] else ""
        values["prompt"] = _prompt_template(task, columns).replace("{prompt}", values["prompt"] + about)
        values["completion"] = task.completion_template.replace("{completion}", values["completion"])
    if "label" in values:
        values["label"] = _label(task, values["label"], f"{origin}: column {columns['label']!r}")
    return {**values, "origin": origin}


def _label(task, text: str, where: str) -> int | float:
    """The number of a class, or for a regression any number."""
    if task.answer != "score" and text in task.label_names:
        return task.label_names.index(text)
    value, count = _number(text), len(task.label_names) or task.num_labels
    if task.answer != "score" and task.label_names and value not in range(count):
        raise PeftJaxError(f"{where} holds {text[:40]!r}, which is no class; {nearest(text, task.label_names)}")
    if task.answer == "score" and math.isfinite(value):
        return value
    if task.answer != "score" and value in range(count):
        return int(value)
    wanted = "a number" if task.answer == "score" else f"a whole number from 0 to {task.num_labels - 1} (num_labels)"
    raise PeftJaxError(f"{where} holds {text[:40]!r}, expected {wanted}")


def _number(text: str) -> float:
    """NaN where the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def keys_of_labels(task, labels: Iterable[str]) -> dict[str, Any]:
    """``answer``, ``label_names`` and ``num_labels`` of a task; ``labels`` are what a head is to tell, as written.

    Numbers that are not all whole are scores. Whole numbers from 0 are classes by number. Other labels are names of
    classes, numbered in sorted order. What the task says itself, it keeps. A label that is empty is none.
    """
    distinct = set(labels) - {""}
    numbers = [_number(label) for label in distinct]
    scores = all(map(math.isfinite, numbers)) and not all(number.is_integer() for number in numbers)
    answer = task.answer if task.answer != "word" else "score" if scores else "class"
    if answer == "score":
        return {"answer": answer}
    whole = all(number.is_integer() and number >= 0 for number in numbers)  # NaN is neither
    if whole and not task.label_names:
        count = task.num_labels if task.label_column else max(task.num_labels, int(max(numbers, default=0)) + 1)
        return {"answer": answer, "num_labels": count}
    names = tuple(task.label_names) or tuple(sorted(distinct))
    return {"answer": answer, "label_names": names, "num_labels": len(names)}


def _prompt_template(task, columns: dict[str, str]) -> str:
    """The task's; where that says nothing, a question or instruction that was not named ends its line."""
    plain = task.prompt_template == "{prompt}" and not task.prompt_column and columns["prompt"] != "prompt"
    return "{prompt}\n" if plain else task.prompt_template


def _text(value, name: str, origin: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise PeftJaxError(f"{origin}: column {name!r} must hold text, found {found}")
    return value


def _messages(value, origin: str) -> list[dict]:
    turns = [{k: v for k, v in turn.items() if v is not None} for turn in value or [] if isinstance(turn, dict)]
    if not turns or any("role" not in turn or "content" not in turn for turn in turns):
        raise PeftJaxError(f"{origin}: messages must be a list of {{'role': ..., 'content': ...}}")
    return turns
