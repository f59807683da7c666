"""Checkpoints of what training changes: adapter, optimiser state, step and random key. The frozen base is never in one.

The position in the data is the step itself: a batch is a pure function of (seed, step).
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from peft_jax.errors import PeftJaxError
from peft_jax.train.step import TrainState


class Checkpoints:
    """The newest ``keep`` checkpoints of a run below ``folder``; each is written aside, while training goes on, and
    then renamed. On a mesh each process writes what its devices hold."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self.folder, self.manager = folder, ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step, or ``None``; of one that is still being written it waits for the end."""
        self.manager.wait_until_finished()
        return self.manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Keep ``state`` under its step; nothing happens if that step is there already."""
        step = int(state.step)
        if step not in self.manager.all_steps():
            self.manager.save(step, args=ocp.args.StandardSave(_storable(state)))

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, bit for bit, with the structure, shapes and placement of ``like``: another mesh or
        number of devices than it was written from makes no difference.

        Returns ``like`` itself where there is none yet. Raises ``PeftJaxError`` where it is damaged or of another
        shape.
        """
        if self.latest is None:
            return like
        try:
            stored = self.manager.restore(self.latest, args=ocp.args.StandardRestore(_storable(like)))
        except Exception as error:  # a damaged file raises whatever orbax and tensorstore meet, bare Exception too
            raise PeftJaxError(self._fault(error)) from error
        rng = jax.random.wrap_key_data(stored["rng"], impl=jax.random.key_impl(like.rng))
        return TrainState(**{**stored, "rng": rng})

    def _fault(self, error: Exception) -> str:
        """What is wrong with the newest checkpoint: it is damaged if it cannot be read without a ``like`` either."""
        what, reason = f"the checkpoint {self.folder / str(self.latest)}", " ".join(str(error).split())[:120]
        try:
            self.manager.restore(self.latest, args=ocp.args.StandardRestore())
        except Exception:
            earlier = max((step for step in self.manager.all_steps() if step != self.latest), default=0)
            return (f"{what} cannot be read: {reason}. Remove that folder to go on from step {earlier}, or train from "
                    "the start in a new one (run.py: --overwrite)")
        return (f"{what} is not of this run: {reason}. Choose another folder (run.py: --workdir), or train from the "
                "start (run.py: --overwrite)")

    def close(self) -> None:
        self.manager.close()


def _storable(state: TrainState) -> dict:
    return state._replace(rng=jax.random.key_data(state.rng))._asdict()
