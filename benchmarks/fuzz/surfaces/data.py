"""Data files, read as the examples of a task; judged by Python's own json and csv."""

import csv
import io
import json
import math
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from benchmarks.fuzz import damages, material
from benchmarks.fuzz.cases import Trial, equal, never

ENDINGS = (".jsonl", ".json", ".csv", ".jsonl", ".txt", ".parquet")
EXAMPLE = {"prompt": "p", "completion": "c"}


def prepare(place: Path) -> None:
    """Nothing is needed but that all is imported."""
    import datasets  # noqa: F401


def trial(base: Any, rng: Random, folder: Path) -> Trial:
    file, rows = folder / f"rows{rng.choice(ENDINGS)}", [dict(row) for row in rng.sample(material.ROWS, 4)]
    if rng.random() < 0.2:
        what, judge, harmless = damages.kind_of(file, rng), never, False
    elif rng.random() < 0.4 or file.suffix in (".txt", ".parquet"):
        what, content = damages.bytes_of(written(rows, ".jsonl" if file.suffix in (".txt", ".parquet") else
                                                 file.suffix, rng), rng)
        file.write_bytes(content)
        judge, harmless = says_what_stands_there(content, file.suffix), False
    else:
        what, rows, harmless = changed(rows, rng)
        content = written(rows, file.suffix, rng, twice=not harmless)
        file.write_bytes((b"\xef\xbb\xbf" if what == "a byte order mark" else b"") + content)
        judge = equal(examples_of(rows)) if harmless else says_what_stands_there(content, file.suffix)
    return Trial(f"{file.name}: {what}", lambda: read(str(file)), judge, harmless)


def changed(rows: list[dict], rng: Random) -> tuple[str, list[dict], bool]:
    """(what was done, rows, whether they say the same) of a change to one value of one row, or to none that counts."""
    row, key = rng.randrange(len(rows)), rng.choice(["prompt", "completion", "prompt", "completion", "note", ""])
    if not key:
        rows[row] = damages.shuffled({**rows[row], "more": "x"} if rng.random() < 0.3 else rows[row], rng)
        rows = rows if "more" not in rows[row] else [{**one, "more": "x"} for one in rows]
        return rng.choice(("columns in another order", "a byte order mark")), rows, True
    if rng.random() < 0.2:
        del rows[row][key]
        return f"row {row + 1} has no {key}", rows, False
    rows[row][key] = rng.choice(damages.ODD)
    return f"{key} of row {row + 1} is {str(rows[row][key])[:40]!r}", rows, False


def written(rows: list[dict], ending: str, rng: Random, twice: bool = True) -> bytes:
    """The file of these rows, now and then with a key ``twice``: no dict can tell of such, so they are made of text."""
    lines = [json.dumps(row) for row in rows]
    if rng.random() < 0.05 and twice:
        lines[0] = '{"prompt": "first", ' + lines[0][1:]
    if ending == ".csv":
        out = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode("utf-8", "surrogatepass")
    return ("[" + ", ".join(lines) + "]" if ending == ".json" else "\n".join(lines)).encode()


def read(path: str) -> list[dict[str, str]]:
    from configs.tasks import COLUMNS
    from peft_jax.data.files import read_table
    from peft_jax.data.tables import table_examples

    task = SimpleNamespace(**{**COLUMNS, "prompt_column": "prompt", "completion_column": "completion"})
    examples = table_examples(task, read_table(path), "rows")
    return [{key: str(example[key]) for key in EXAMPLE} for example in examples]


def examples_of(rows: list[dict]) -> list[dict[str, str]]:
    return [{key: str(row[key]) for key in EXAMPLE} for row in rows]


def says_what_stands_there(content: bytes, ending: str):
    """A judge: the examples are the texts and numbers of the file, as written, and no text is half a letter."""

    def judge(result: list[dict[str, str]]) -> str:
        try:
            rows = independent(content, ending)
            expected = [{key: _text(row[key]) for key in EXAMPLE} for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
            return f"it was accepted, and is not readable: {type(error).__name__}: {error}"
        return equal(expected)(result)

    return judge


def independent(content: bytes, ending: str) -> list[dict[str, Any]]:
    text = content.decode("utf-8-sig")
    if ending == ".csv":
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
        return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    load = {"parse_float": _Number, "parse_int": _Number, "parse_constant": _Number, "object_pairs_hook": _strict}
    if ending == ".json" and text.strip().startswith("["):
        return json.loads(text, **load)
    return [json.loads(line, **load) for line in text.split("\n") if line.strip()]


class _Number(str):
    """A number as it is written."""


def _strict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text and no number")
    if isinstance(value, _Number) and math.isnan(float(value)) and value != "NaN":
        raise TypeError(value)
    return value.encode().decode()
