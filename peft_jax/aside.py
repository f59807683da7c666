"""Files that are never half there: written aside, then renamed."""

import os
from pathlib import Path


def write(path: Path, data: str | bytes) -> None:
    """Text (UTF-8) or bytes: a reader finds the old file or the new one, a crash leaves at most ``path.tmp`` behind.

    Raises ``OSError`` where the folder is missing or full.
    """
    aside = path.with_name(path.name + ".tmp")
    aside.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(aside, path)
