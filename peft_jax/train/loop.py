"""The training loop: step, look at the loss, log, checkpoint. It knows no method, no model and no task."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from peft_jax.core.rows import real_tokens
from peft_jax.errors import PeftJaxError
from peft_jax.parallel import processes
from peft_jax.parallel.mesh import feed
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.memory import memory_now
from peft_jax.train.metrics_log import MetricsLog
from peft_jax.train.progress import Progress
from peft_jax.train.step import TrainState


class BatchSource(Protocol):
    """What training takes its batches from, such as :class:`peft_jax.data.Batches`."""

    accumulate_steps: int  # micro-batches of a step

    def at(self, step: int) -> dict[str, np.ndarray]:
        """A step's batch; where there are several micro-batches, these are the first axis."""
        ...


class StopRequest:
    """While entered, Ctrl-C or SIGTERM asks the loop to stop after its step; a second one interrupts at once.

    ``asked`` is the signal's number, 0 before. Of several processes only all together can stop: there SIGTERM is left
    to jax, which tells the others (``processes.preempted``), and Ctrl-C interrupts.
    """

    def __init__(self):
        self.asked, self._usual = 0, {}

    def __enter__(self):
        # Not in other threads, where Python allows no handler.
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._usual = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def after(self, step: int) -> bool:
        """Whether to stop after ``step``."""
        if not self.asked and processes.preempted(step):
            self.asked = int(signal.SIGTERM)
        return bool(self.asked)

    def _ask(self, number, frame):
        self.asked = int(number)
        self._restore()

    def _restore(self):
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self._restore()


class Trace:
    """Entered around each step: a profile of ``steps`` of them, after the compiling first one, in ``folder``.

    For TensorBoard's profile plugin, XProf or Perfetto. ``close`` writes what there is when training ends before.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self.steps, self.seen, self.running = folder, steps, 0, False

    def __enter__(self):
        self.seen += 1
        if self.seen == 2:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def __exit__(self, *exception):
        if self.seen == 1 + self.steps or exception[0]:
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
        elif self.seen < 2:
            print("no step was profiled: only steps after the first one, which compiles, are, and there was none")
        self.running = False


def fit(
    step: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    batches: BatchSource,
    *,
    total_steps: int,
    schedule: Callable[[int], Any],
    checkpoints: Checkpoints,
    log: MetricsLog,
    checkpoint_due: Callable[[int], bool],
    log_every: int,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_due: Callable[[int], bool] = lambda step: False,
    mesh: Mesh | None = None,
    stop: StopRequest | None = None,
    guard: str = "allow",
    trace: Trace | None = None,
) -> TrainState:
    """Train from ``state.step`` to ``total_steps``, or until a ``StopRequest``; the state returned is checkpointed.

    Args:
      step: of ``make_step``; it consumes the state it is given.
      schedule: learning rate of a step, a scalar, for the log.
      checkpoint_due: of :func:`due`; one checkpoint more is written at the end.
      log_every: in steps; the last one and those with an evaluation are logged as well.
      evaluate: metrics of a state, logged as ``eval_<name>`` after steps for which ``evaluate_due``; the time that it
        takes is no time of training.
      mesh: on which the state lies; batches are laid there. stop: which tells afterwards why training stopped.
      guard: what to do about copies between host and device that a step does and nobody asked for, as of
        ``jax.transfer_guard``. trace: of :class:`Trace`.
    Raises:
      PeftJaxError: a loss, gradient norm or update norm that is not finite, naming the step; the checkpoints before
        it remain.
    """
    done = int(state.step)
    progress = Progress(total_steps, done, processes.first())
    told = _Told(schedule, checkpoints, log, progress)
    batch, stopping = at_step(batches, done) if done < total_steps else {}, False
    with stop or StopRequest() as stop:
        while done < total_steps and not stopping:
            state, metrics = _take(step, state, frozen, batch, mesh, guard, trace)
            told.read()  # the step before this one, while the device works at it
            tokens, done = int(real_tokens(batch).sum()), done + 1
            told.add(done, metrics, tokens, logged=done % log_every == 0)
            batch = at_step(batches, done) if done < total_steps else {}
            if evaluate and evaluate_due(done):
                told.read(evaluate=partial(evaluate, state))
            stopping = stop.after(done)
            if checkpoint_due(done) or done == total_steps or stopping:
                told.read(logged=done == total_steps or stopping)
                checkpoints.save(state)
    progress.close()
    return state


def _take(step: Callable, state: TrainState, frozen: Any, batch: Any, mesh: Mesh | None, guard: str,
          trace: Trace | None) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step; the device may still be at work when this returns, but for a traced one."""
    with trace or contextlib.nullcontext():
        arrays = feed(mesh, batch, axis=1)
        with jax.transfer_guard(guard):
            state, metrics = step(state, frozen, arrays)
        if trace:
            jax.block_until_ready(metrics)
    return state, metrics


def due(every: int, also: Collection[int] = ()) -> Callable[[int], bool]:
    """Whether something is due after a step: after each ``every`` steps (0: never), and after the steps ``also``."""
    return lambda step: step in also or (every > 0 and step % every == 0)


def at_step(batches: BatchSource, step: int) -> dict[str, np.ndarray]:
    """A step's batch with the axis of micro-batches in front, also where there is but one."""
    batch = batches.at(step)
    return batch if batches.accumulate_steps > 1 else {name: array[None] for name, array in batch.items()}


def _check_finite(values: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    broken = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        kept = f"the checkpoint of step {checkpoints.latest} is kept in {checkpoints.folder}"
        raise PeftJaxError(
            f"training broke at step {step}: {', '.join(broken)}; "
            f"{kept if checkpoints.latest is not None else 'no checkpoint was written yet'}. "
            "Try a lower learning rate or a longer warm-up (run.py: --config.optim.learning_rate, "
            "--config.optim.warmup_ratio), or look at that step's data"
        )


class _Told:
    """What a step says, read when the next one is under way, so that the device need not wait for the host; at once
    where something depends on it: an evaluation, a checkpoint, the end."""

    def __init__(self, schedule: Callable[[int], Any], checkpoints: Checkpoints, log: MetricsLog, progress: Progress):
        self.schedule, self.checkpoints, self.log, self.progress = schedule, checkpoints, log, progress
        self.clock = _Clock(before=log.last["seconds"] if log.last else 0.0)
        self.waiting: tuple[int, dict[str, jax.Array], int, bool] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array], tokens: int, logged: bool) -> None:
        self.waiting = step, metrics, tokens, logged

    def read(self, logged: bool = False, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Wait for the step, look at its numbers, and log them where it is time, with an evaluation always. Raises as
        ``fit``."""
        if self.waiting is None:
            return
        (step, metrics, tokens, due_now), self.waiting = self.waiting, None
        values = {name: float(value) for name, value in metrics.items()}
        _check_finite(values, step, self.checkpoints)
        values |= self.clock.lap(tokens) | {"learning_rate": float(self.schedule(step - 1)), "memory": memory_now()}
        if evaluate:
            with self.clock.paused():
                values |= {f"eval_{name}": value for name, value in evaluate().items()}
        if logged or due_now or evaluate:
            self.log.write(step, values)
        self.progress.update(step, values["loss"], values["tokens_per_second"])


class _Clock:
    """Seconds of training over all resumptions, and the rate of tokens, the compiling first step left out."""

    def __init__(self, before: float):
        self.before, self.start, self.warm, self.tokens = before, time.perf_counter(), None, 0

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        away = time.perf_counter() - began
        self.start, self.warm = self.start + away, self.warm and self.warm + away

    def lap(self, tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = self.before + now - self.start
        if self.warm is None:
            self.warm = now
            return {"seconds": seconds, "tokens_per_second": tokens / (now - self.start)}
        self.tokens += tokens
        return {"seconds": seconds, "tokens_per_second": self.tokens / (now - self.warm)}
