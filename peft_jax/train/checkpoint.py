"""Checkpoints of what training changes: adapter, optimiser state, step and random key. The frozen base is never in one.

The position in the data is the step itself: a batch is a pure function of (seed, step).

Beside the state stands a checksum of each array, made where the array lies: the formats of orbax have none, and a bit
that turned over on a disk would train on unseen.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from peft_jax.core import files
from peft_jax.core.checksums import checksums
from peft_jax.errors import PeftJaxError, disk_fault
from peft_jax.train.step import TrainState

CHECKSUMS = "checksums"


class OnDisk(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint's folder, which is on the disk before it gets its name."""

    async def finalize(self) -> None:
        await asyncio.to_thread(files.flush_all, Path(self.get()))
        await super().finalize()


class Checkpoints:
    """The newest ``keep`` checkpoints of a run below ``folder``; each is written aside, while training goes on, and
    then renamed. On a mesh each process writes what its devices hold."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, temporary_path_class=OnDisk)
        self.folder = folder
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options,
                                             item_handlers=ocp.StandardCheckpointHandler())

    @property
    def latest(self) -> int | None:
        """The newest checkpoint's step, or ``None``; of one that is still being written it waits for the end."""
        with self._writing():
            self.manager.wait_until_finished()
        return self.manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Keep ``state`` under its step; nothing happens if that step is there already. Raises ``PeftJaxError`` where
        it, or the one before it, cannot be written."""
        step = int(state.step)
        if step not in self.manager.all_steps():
            plain = storable(state)
            with self._writing():
                self.manager.save(step, args=ocp.args.StandardSave({**plain, CHECKSUMS: checksums(plain)}))

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, bit for bit, with the structure, shapes and placement of ``like``: another mesh or
        number of devices than it was written from makes no difference.

        Returns ``like`` itself where there is none yet. Raises ``PeftJaxError`` where it is damaged or of another
        shape.
        """
        if self.latest is None:
            return like
        plain = storable(like)
        try:
            target = {**plain, CHECKSUMS: checksums(plain)} if self._has_checksums(self.latest) else plain
            stored = dict(self.manager.restore(self.latest, args=ocp.args.StandardRestore(target)))
        except Exception as error:  # a damaged file raises whatever orbax and tensorstore meet, bare Exception too
            raise PeftJaxError(self._fault(error)) from error
        self._check(stored, stored.pop(CHECKSUMS, None))
        rng = jax.random.wrap_key_data(stored["rng"], impl=jax.random.key_impl(like.rng))
        return TrainState(**{**stored, "rng": rng})

    def _has_checksums(self, step: int) -> bool:
        """Not so in a checkpoint of a version before there were any."""
        return CHECKSUMS in self.manager.item_metadata(step).tree

    def _check(self, stored: dict[str, Any], written: dict[str, Any] | None) -> None:
        """Raise ``PeftJaxError`` where an array is not the one that was written."""
        now = checksums(stored)
        odd = [name for name in now if written is not None and np.any(np.asarray(now[name]) != written[name])]
        if odd:
            raise PeftJaxError(f"the checkpoint {self.folder / str(self.latest)} is damaged: {odd[0]} is not what was "
                               f"written. {self._way_on()}")

    def _way_on(self) -> str:
        earlier = max((step for step in self.manager.all_steps() if step != self.latest), default=0)
        return (f"Remove that folder to go on from step {earlier}, or train from the start in a new one (run.py: "
                "--overwrite)")

    def _fault(self, error: Exception) -> str:
        """What is wrong with the newest checkpoint: it is damaged if it cannot be read without a ``like`` either."""
        what, reason = f"the checkpoint {self.folder / str(self.latest)}", " ".join(str(error).split())[:120]
        try:
            self.manager.restore(self.latest, args=ocp.args.StandardRestore())
        except Exception:
            return f"{what} cannot be read: {reason}. {self._way_on()}"
        return (f"{what} is not of this run: {reason}. Choose another folder (run.py: --workdir), or train from the "
                "start (run.py: --overwrite)")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a thread that writes: whatever orbax and tensorstore meet, bare Exception too
            raise PeftJaxError(f"a checkpoint cannot be written to {self.folder}: {disk_fault(error)}; those before it "
                               "remain, and the same command goes on from there") from error

    def close(self) -> None:
        """Wait for what is still being written; raises ``PeftJaxError`` where it cannot be."""
        with self._writing():
            self.manager.close()


def storable(state: TrainState) -> dict[str, Any]:
    """The state as a tree of plain arrays."""
    return state._replace(rng=jax.random.key_data(state.rng))._asdict()
