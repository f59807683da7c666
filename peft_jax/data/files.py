"""Rows of local files: .jsonl, .json and .csv as they are written, and .parquet through ``datasets``."""

import csv
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from peft_jax.core.files import expanded, parse_json, regular_file
from peft_jax.errors import PeftJaxError, nearest, needed, root_cause


class WrittenNumber(float):
    """A number whose text is the one in the file: ``1e-5`` or ``10000000.0``, where a float's would be another."""

    text: str

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def read_table(path: str) -> list[dict]:
    """Rows of a local .jsonl, .json, .csv or .parquet file, or of all files that a pattern such as ``a/*.csv`` matches.

    What a .csv holds is text, "007" and "NA" too. In JSON a string is a string whatever it looks like, and a number's
    ``str()`` is what the file says. A row without a key that others have holds ``None`` for it.

    Raises:
      PeftJaxError: missing file, unknown ending, unreadable content (by line where the line can be told), no rows.
    """
    rows = [row for file in _matching_files(path) for row in _rows(file)]
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def _matching_files(path: str) -> list[Path]:
    if not path:
        raise PeftJaxError("task.source is empty: name a data file")
    pattern = expanded(path)
    if os.path.isfile(pattern):  # which, unlike Path's, raises nothing
        return [pattern]
    try:
        beside = sorted(pattern.parent.iterdir()) if os.path.isdir(pattern.parent) else []
    except OSError as error:
        raise PeftJaxError(f"no data file at {path!r}: {pattern.parent} cannot be read: {error.strerror}") from error
    files = [one for one in beside if pattern.name and one.match(pattern.name) and not one.is_dir()]
    if not files and os.path.isdir(pattern):
        raise PeftJaxError(f"no data file at {path!r}, which is a folder: name the files, such as {pattern}/*.jsonl")
    if not files:
        raise PeftJaxError(f"no data file at {path!r}; {nearest(pattern.name, [file.name for file in beside])}")
    return files


def _rows(file: Path) -> list[dict]:
    """The rows of one file; whatever its reader raises becomes one line that names it."""
    if file.suffix not in READERS:
        raise PeftJaxError(f"cannot read {file}: {file.suffix or 'no ending'!r} is not a known file ending; "
                           f"{nearest(file.suffix, READERS)}")
    size = regular_file(file, "the data").stat().st_size
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"):
        raise PeftJaxError(f"{file} has {size:.1e} bytes, more than the memory of this machine: cut it into parts")
    try:
        return list(READERS[file.suffix](file))
    except PeftJaxError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise PeftJaxError(f"cannot read {file}: {root_cause(error)}") from error


def _json_lines(file: Path) -> list[dict]:
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise PeftJaxError(f"{file} is empty: put one JSON object on each line")
    return [_object(line, f"{file}, line {number}")
            for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]


def _object(line: bytes, where: str) -> dict:
    row = _json(line, where)
    if not isinstance(row, dict):
        raise PeftJaxError(f"{where}: not a JSON object: {line[:60]!r}")
    return row


def _json(content: bytes, where: str) -> Any:
    try:
        value = parse_json(content.decode(), parse_float=WrittenNumber, parse_constant=WrittenNumber, parse_int=_whole)
        if b"\\ud" in content.lower():  # perhaps half a letter, which JSON can hold and no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are of the first kind
        raise PeftJaxError(f"{where}: not valid JSON ({error})") from error
    return value


def _whole(text: str) -> int | WrittenNumber:
    return WrittenNumber(text) if text == "-0" else int(text)


def _json_array(file: Path) -> list[dict]:
    """Of one array of objects; else of one object on each line, as some write under this ending, too."""
    content = file.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    if not content.startswith(b"["):
        lines = content.splitlines()
        if len(lines) < 2 or not lines[0].strip().endswith(b"}"):
            raise PeftJaxError(f"{file} must hold one JSON array of objects, [{{...}}, {{...}}], or an object on each "
                               f"line; it starts with {content[:40]!r}")
        return _json_lines(file)
    rows = _json(content, str(file))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise PeftJaxError(f"{file}, entry {number}: not a JSON object: {str(row)[:60]!r}")
    return rows


def _csv(file: Path) -> list[dict]:
    csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return _csv_rows(file, csv.reader(lines, strict=True))
    except UnicodeDecodeError as error:
        raise PeftJaxError(f"cannot read {file}: it is not UTF-8 ({error}); save it as UTF-8") from error


def _csv_rows(file: Path, lines: Any) -> list[dict]:
    names, rows = None, []
    try:
        for fields in lines:
            if not fields:  # an empty line
                continue
            if any("\0" in field for field in fields):
                raise PeftJaxError(f"{file}, line {lines.line_num}: it holds a NUL, as no text does: save it as UTF-8")
            if names is None:
                names = _column_names(file, fields)
            elif len(fields) != len(names):
                raise PeftJaxError(f"{file}: the row that ends on line {lines.line_num} has {len(fields)} fields, the "
                                   f"first line names {len(names)}; put quotes around text that holds a comma")
            else:
                rows.append(dict(zip(names, fields)))
    except csv.Error as error:
        raise PeftJaxError(f"{file}, line {lines.line_num}: {error}") from error
    if not rows:
        raise PeftJaxError(f"{file} has no rows: put the columns' names on the first line and one example on each line "
                           "below")
    return rows


def _column_names(file: Path, fields: list[str]) -> list[str]:
    twice = [name for name in dict.fromkeys(fields) if fields.count(name) > 1]
    if twice:
        raise PeftJaxError(f"{file}: two columns are called {twice[0]!r}; rename one")
    return fields


def _parquet(file: Path) -> Iterable[dict]:
    datasets = needed("datasets", f"to read {file}")
    # A cache of its own, gone after the read: a local file is its own cache, and a changed file is never served old.
    with tempfile.TemporaryDirectory() as cache:
        try:
            with without_bars(datasets):
                table = datasets.load_dataset("parquet", data_files=[str(file)], split="train", cache_dir=cache)
            return [without_nulls(row) for row in table.to_list()]
        except Exception as error:  # `datasets` wraps whatever its readers raise
            raise PeftJaxError(f"cannot read {file}: {root_cause(error)}") from error


def without_nulls(row: dict) -> dict:
    """A row of an Arrow table without what it fills the dicts in a column with: the keys that only others have."""
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value


@contextmanager
def without_bars(datasets: ModuleType) -> Iterator[None]:
    """``datasets`` without its bars, such as "Generating train split", and without a line of its own before an error;
    the bars of downloads are huggingface_hub's."""
    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


READERS = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv, ".parquet": _parquet}
