"""A run as one JSON file: ``<folder>/<experiment_name, "/" as "--">.json``.

The shape is that of the results of Hugging Face peft's ``method_comparison`` (``run_info``, ``train_info``,
``meta_info``), so that rows lie beside theirs; what they do not measure is under the key ``peft_jax``. JSON has no NaN:
a number that is not finite is written as null and counts as not measured.
"""

import json
import math
from pathlib import Path
from typing import Any

from peft_jax.core import files
from peft_jax.errors import PeftJaxError, one_line
from peft_jax.studies.comparison.runs import run_of

Record = dict[str, Any]
MEND = "remove the file or run its cell again"


def write(folder: Path, record: Record) -> Path:
    """Write a record and return its path; the folder is made, an older record of that name replaced.

    Raises ``PeftJaxError``, and writes nothing, where the record could not be read back (see ``run_of``) or holds what
    JSON cannot. Scalars of numpy and jax are written as numbers.
    """
    name = run_of(record).name
    try:
        text = json.dumps(_finite(record), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise PeftJaxError(f"the record of {name} cannot be written as JSON: {error}") from error
    path = path_of(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text)
    return path


def path_of(folder: Path, name: str) -> Path:
    """Where the record of the run ``name``, its experiment_name, is or will be."""
    return Path(folder) / f"{name.replace('/', '--')}.json"


def _finite(value: Any) -> Any:
    """
    >>> _finite({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if getattr(value, "shape", None) == ():  # a scalar of numpy or jax
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(folder: Path) -> list[Record]:
    """All records of a folder by file name, ours and peft's own.

    A damaged file must not cost the others, nor go missing from a table unseen: it comes as the record of a failed run
    that names the file and says what is wrong with it. Raises ``PeftJaxError`` where there is no record at all.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise PeftJaxError(f"{folder} holds no records of runs (*.json); give the folder that a comparison wrote to, "
                           "<workdir>/results")  # fmt: skip
    return [read_one(path) for path in paths]


def read_one(path: Path) -> Record:
    """The record in a file; a damaged one as :func:`read` gives it."""
    try:
        record = files.read_json(path, mend=MEND)
        run_of(record)
        json.dumps(record, ensure_ascii=False).encode()  # half a character, which JSON can hold and no file of text
    except (ValueError, RecursionError) as error:  # a PeftJaxError is of the first kind
        said = str(error).removeprefix(f"{path} ").removesuffix(f": {MEND}.")
        return failed(one_line(path.stem).replace("--", "/", 1), one_line(f"{path} cannot be read: {said}; {MEND}"))
    return record


def failed(name: str, error: str) -> Record:
    """The record of a run of which nothing is known but that it failed."""
    return {"run_info": {"experiment_name": name, "error_msg": error},
            "train_info": {"status": "failed", "metrics": []}, "meta_info": {}}  # fmt: skip
