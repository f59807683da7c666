"""Tables of prompts and answers: local files and the Hugging Face Hub, both through ``datasets``."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peft_jax.errors import PeftJaxError, nearest

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_table(path: str, columns: Sequence[str] = ()) -> list[dict]:
    """Rows of a local .jsonl, .json, .csv or .parquet file, or of all files that a pattern such as ``a/*.csv`` matches.

    Args:
      columns: read as text from .csv, so that "007" or "NA" stay what they are.
    Raises:
      PeftJaxError: missing file, unknown ending, unreadable content (by line where the line can be told).
    """
    files = _matching_files(path)
    suffix = files[0].suffix
    if suffix not in READERS:
        raise PeftJaxError(
            f"cannot read {files[0]}: {suffix or 'no ending'!r} is not a known file ending; {nearest(suffix, READERS)}"
        )
    import datasets

    options = {"keep_default_na": False, "converters": dict.fromkeys(columns, str)} if suffix == ".csv" else {}
    # A cache of its own, gone after the read: a local file is its own cache, and a changed file is never served old.
    with tempfile.TemporaryDirectory() as cache:
        try:
            names = [str(file) for file in files]
            table = datasets.load_dataset(READERS[suffix], data_files=names, split="train", cache_dir=cache, **options)
            return table.to_list()
        except Exception as error:  # `datasets` wraps whatever its readers raise
            raise PeftJaxError(_bad_line(files) or f"cannot read {path}: {_root_cause(error)}") from error


def _matching_files(path: str) -> list[Path]:
    if not path:
        raise PeftJaxError("task.source is empty: name a data file")
    given = Path(path).expanduser()
    beside = sorted(given.parent.iterdir()) if given.parent.is_dir() else []
    files = [given] if given.is_file() else [file for file in beside if file.match(given.name) and file.is_file()]
    if not files:
        raise PeftJaxError(f"no data file at {path!r}; {nearest(given.name, [file.name for file in beside])}")
    return files


def _bad_line(files: Sequence[Path]) -> str | None:
    """What is wrong with the first .jsonl file that is empty or has a line that is no JSON object, or None."""
    for file in files:
        if file.suffix == ".jsonl" and not file.read_bytes().strip():
            return f"{file} is empty: put one JSON object on each line"
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1) if file.suffix == ".jsonl" else ():
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f"{file}, line {number}: not a JSON object: {line[:60]!r}"
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
                return f"{file}, line {number}: not valid JSON ({error})"
    return None


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read_hub(source: str, subset: str, split: str) -> list[dict]:
    """Rows of one split of a Hub data set; no code of the data set is run.

    Raises:
      PeftJaxError: no such data set, subset or split, no access, or the Hub cannot be reached.
    """
    if not source:
        raise PeftJaxError("task.source is empty: name a data set of the Hugging Face Hub")
    import datasets

    try:
        return datasets.load_dataset(source, subset or None, split=split).to_list()
    except Exception as error:  # requests, hub, fsspec and datasets errors alike
        raise PeftJaxError(
            f"cannot load the data set {source!r} (subset {subset or 'default'}, split {split}) from the Hugging Face "
            f"Hub: {_root_cause(error)}; check the names, the network and HF_TOKEN, or use a local file with task=file"
        ) from error


def table_examples(task, rows: Sequence[dict], where: str) -> list[dict]:
    """Rows as examples, by the columns that ``task`` names.

    Raises:
      PeftJaxError: no or conflicting columns named, a column that does not exist (with the nearest), a row without a
        value.
    """
    columns = named_columns(task)
    for name in columns.values():
        if rows and name not in rows[0]:
            raise PeftJaxError(f"{where} has no column {name!r}; {nearest(name, rows[0])}")
    return [_table_example(task, columns, row, f"{where} row {number}") for number, row in enumerate(rows, start=1)]


def named_columns(task) -> dict[str, str]:
    """{"prompt", "completion", "messages" or "text": the column's name}, for those that the task names."""
    given = {
        "prompt": task.prompt_column,
        "completion": task.completion_column,
        "messages": task.messages_column,
        "text": task.text_column,
    }
    given = {key: name for key, name in given.items() if name}
    if set(given) not in ({"prompt", "completion"}, {"messages"}, {"text"}):
        raise PeftJaxError(
            "name the columns: either task.prompt_column and task.completion_column, or task.messages_column, "
            f"or task.text_column (given: {', '.join(given) or 'none'})"
        )
    return given


def _table_example(task, columns: dict[str, str], row: dict, origin: str) -> dict:
    if "messages" in columns:
        return {"messages": _messages(row[columns["messages"]], origin), "origin": origin}
    values = {key: _text(row[name], name, origin) for key, name in columns.items()}
    if "prompt" in values:
        values["prompt"] = task.prompt_template.replace("{prompt}", values["prompt"])
        values["completion"] = task.completion_template.replace("{completion}", values["completion"])
    return {**values, "origin": origin}


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
