"""Rows of a table as examples, by what their columns hold; and tables of the Hugging Face Hub."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from peft_jax.data.files import without_bars, without_nulls
from peft_jax.data.turns import Names, chat_of
from peft_jax.errors import PeftJaxError, nearest, needed, root_cause

# Columns whose names say what they hold, for a task that names none. "input" is what an instruction is about.
KNOWN = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "prompt", "completion": "completion"},
    {"prompt": "question", "completion": "answer"},
    {"prompt": "instruction", "completion": "output"},
    {"prompt": "instruction", "completion": "output", "input": "input"},
    {"prompt": "instruction", "completion": "response"},
    {"prompt": "instruction", "completion": "response", "input": "input"},
    {"prompt": "instruction", "completion": "response", "input": "context"},
    {"text": "text"},
)
# Columns beside these that belong to them, by the first use of those; only a chat has a place for their values.
BESIDE = {"messages": ("system", "tools"), "prompt": ("system", "history", "tools")}
MOST_LABELS = 1 << 16  # classes: a head of each further one takes memory, and a number that large is seldom a class
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
            return [without_nulls(row) for row in datasets.load_dataset(source, subset or None, split=split).to_list()]
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
        return {**named, "tools": "tools"} if "messages" in named and "tools" in names else named
    if task.answer == "word":
        use = known_columns(names, where)
        return use | {name: name for name in BESIDE.get(next(iter(use)), ()) if name in names}
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
    beside = {key: row[key] for key in BESIDE["prompt"] if key in columns and row[key]}
    values = {key: row[name] for key, name in columns.items() if key not in BESIDE["prompt"]}
    if "messages" in values or isinstance(values.get("prompt"), list) or isinstance(values.get("completion"), list):
        return _chat(task, {**values, **beside}, origin)
    values = {key: value if key == "input" else _text(value, columns[key], origin) for key, value in values.items()}
    if "prompt" in values:
        about = values.pop("input", None)
        about = f"\n\n{about}" if about else ""
        values["prompt"] = _prompt_template(task, columns).replace("{prompt}", values["prompt"] + about)
        values["completion"] = task.completion_template.replace("{completion}", values["completion"])
    if beside and not getattr(task, "chat", False):
        raise PeftJaxError(f"{origin}: only a chat has a place for what its column {next(iter(beside))!r} holds: set "
                           "--config.task.chat=True, or name the columns to use with --config.task.prompt_column and "
                           "--config.task.completion_column")
    if "label" in values:
        values["label"] = _label(task, values["label"], f"{origin}: column {columns['label']!r}")
    return {**values, **beside, "origin": origin}


def _chat(task, values: dict[str, Any], origin: str) -> dict:
    """A chat of a row, as messages or as a prompt and a completion of messages."""
    if "messages" not in values and (task.prompt_template, task.completion_template) != ("{prompt}", "{completion}"):
        raise PeftJaxError(f"{origin} holds messages, which task.prompt_template and task.completion_template cannot "
                           "frame: leave these out")
    return {**chat_of({key: value for key, value in values.items() if key != "history"}, origin, _names(task)),
            "origin": origin}


def _names(task) -> Names:
    """What the task says that its table calls roles and their keys. Raises ``PeftJaxError`` for a role without "="."""
    pairs = [pair.partition("=") for pair in getattr(task, "roles", ())]
    if wrong := [name for name, equals, role in pairs if not (name and equals and role)]:
        raise PeftJaxError(f"task.roles has {wrong[0]!r}: write NAME=ROLE, such as \"('critic=assistant',)\"")
    return Names((getattr(task, "role_key", ""), getattr(task, "content_key", "")),
                 {name: role for name, _, role in pairs})


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
        if count > MOST_LABELS:
            raise PeftJaxError(f"labels are whole numbers up to {count - 1:.6g}, and there can be {MOST_LABELS} "
                               "classes by number: set --config.task.label_names, or --config.task.answer=score")
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
