"""Metrics of a training: one JSON object per line, and TensorBoard."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_jax.core import files
from peft_jax.core.json_shape import NUMBER, misfit
from peft_jax.errors import PeftJaxError, needed

MEND = "remove the line, or start a new file"


class MetricsLog:
    """Appends to the file ``path``, one JSON object per line, and writes for TensorBoard into the folder ``board``.

    Lines beyond ``first_step`` are of steps that a resumed run does again; they are dropped. ``last`` is the last line
    that was kept or written, ``{}`` at the start. What is ``None`` is not written. Raises ``PeftJaxError`` as
    :func:`read_metrics` does.
    """

    def __init__(self, path: Path | None, first_step: int, board: Path | None = None, needed: Sequence[str] = ()):
        self.last = _keep_until(path, first_step, needed) if path else {}
        self.file = path.open("a", encoding="utf-8") if path else None
        self.board = _open_board(board, first_step) if board else None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` of an optimiser step."""
        self.last = {"step": step, **values}
        if self.file:
            self.file.write(json.dumps(self.last) + "\n")
            self.file.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        for one in (self.file, self.board):
            if one:
                one.close()


def _keep_until(path: Path, step: int, needed: Sequence[str]) -> dict[str, float]:
    rows = [row for row in read_metrics(path, *needed) if row["step"] <= step]
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1] if rows else {}


def read_metrics(path: Path, *needed: str) -> list[dict[str, float]]:
    """All complete lines of a metrics file, [] where there is none; a last line cut short by a crash is left out.

    Raises ``PeftJaxError`` for what is no object of numbers, or lacks the step or a ``needed`` one.
    """
    if not os.path.lexists(path):
        return []
    lines = files.regular_file(path, "a run's metrics", mend=MEND).read_bytes().splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines) or line.endswith(b"\n"):
                raise PeftJaxError(f"{path}:{number} is not JSON: {MEND}") from error
        else:
            if fault := _fault(rows[-1], needed):
                raise PeftJaxError(f"{path}:{number} is damaged, {fault}: {MEND}")
    return rows


def _fault(row: Any, needed: Sequence[str]) -> str:
    return misfit(row, {"step": int, **dict.fromkeys(needed, NUMBER)}) or misfit(row, {str: NUMBER})


def tensorboard():
    """The package that writes for TensorBoard. Raises ``PeftJaxError`` where it is not installed."""
    return needed("tensorboardX", "to write for TensorBoard (run.py: --config.log.tensorboard=False does without)")


def _open_board(folder: Path, first_step: int):
    return tensorboard().SummaryWriter(str(folder), purge_step=first_step + 1)
