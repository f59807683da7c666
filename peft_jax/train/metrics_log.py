"""Metrics of a training: one JSON object per line, and TensorBoard."""

import json
from pathlib import Path

from peft_jax.core import files
from peft_jax.errors import PeftJaxError, needed


class MetricsLog:
    """Appends to the file ``path``, one JSON object per line, and writes for TensorBoard into the folder ``board``.

    Lines beyond ``first_step`` are of steps that a resumed run does again; they are dropped. ``last`` is the last line
    that was kept or written, ``{}`` at the start. What is ``None`` is not written.
    """

    def __init__(self, path: Path | None, first_step: int, board: Path | None = None):
        self.last = _keep_until(path, first_step) if path else {}
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


def _keep_until(path: Path, step: int) -> dict[str, float]:
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows[-1] if rows else {}


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file, [] where there is none; a last line cut short by a crash is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise PeftJaxError(f"{path}:{number} is not JSON: remove the line, or start a new file") from error
    return rows


def tensorboard():
    """The package that writes for TensorBoard. Raises ``PeftJaxError`` where it is not installed."""
    return needed("tensorboardX", "to write for TensorBoard (run.py: --config.log.tensorboard=False does without)")


def _open_board(folder: Path, first_step: int):
    return tensorboard().SummaryWriter(str(folder), purge_step=first_step + 1)
