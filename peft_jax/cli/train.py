"""``--mode=train``: evaluate, train, evaluate, save; what was interrupted goes on."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.cli import console, fingerprint, runtime, workdir
from peft_jax.cli.build_method import build_method
from peft_jax.cli.build_optimizer import build_optimizer, build_schedule
from peft_jax.cli.checks import check_fits
from peft_jax.cli.session import Session, load_session
from peft_jax.cli.show import first_example
from peft_jax.core import settings, tree
from peft_jax.data import Batches
from peft_jax.data.chat import unused_template
from peft_jax.data.tokenize import describe
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub.adapters.save import is_stored, save_adapter
from peft_jax.hub.chat_template import describe_stops
from peft_jax.hub.save import save_pretrained
from peft_jax.method import FROZEN, Method
from peft_jax.parallel import partitioning, processes
from peft_jax.parallel.mesh import feed, row_shards, several
from peft_jax.planner.compiled import memory_of
from peft_jax.train import memory
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.loop import StopRequest, Trace, at_step, due, fit
from peft_jax.train.metrics_log import MetricsLog, tensorboard
from peft_jax.train.progress import say
from peft_jax.train.step import TrainState, init_state, make_step, state_shardings

LOGGED = ("loss", "seconds", "tokens_per_second")  # of each line of metrics.jsonl at least
LOOKED_AT = 8  # batches that a method may see before training


class Run(NamedTuple):
    """What stays as it is while a run trains. counts: (trainable, all) parameters. before: metrics, {} for none."""

    folder: Path
    session: Session
    method: Method
    batches: Batches
    total: int
    counts: tuple[int, int]
    evaluate: Callable
    before: dict[str, float]
    step: Callable
    frozen: tree.Tree


class Training(NamedTuple):
    """How training ended. evaluations: metrics by step, of those on the way. signal: that stopped it, 0 for none."""

    state: TrainState
    seconds: float
    evaluations: dict[int, dict[str, float]]
    signal: int


def job(command) -> int:
    """Train, evaluate before and after, save; goes on where an interrupted run of the workdir stopped."""
    with processes.one_voice():
        folder = Path(command.workdir)
        processes.check_alike({**command.config.to_dict(), "--overwrite": command.overwrite})
        workdir.check_writable(folder, leave=jax.process_count() > 1)
        workdir.check_own(folder, *workdir.WRITTEN)
        with workdir.locked(folder):
            return _already_done(folder) if _is_done(command, folder) else _train(command, folder)


def _is_done(command, folder: Path) -> bool:
    """Whether the workdir holds this run, finished. Raises ``PeftJaxError`` where it holds another."""
    if command.overwrite:
        return False
    workdir.check_config(folder, command.config.to_dict())
    workdir.check_kinds(folder)
    return processes.agreed((folder / "results.json").exists())


def _already_done(folder: Path) -> int:
    print(f"{folder} holds this run, finished; nothing is left to train. --mode=eval evaluates it again, --overwrite "
          "trains it again. Its results:\n")  # fmt: skip
    print(console.summary(workdir.read_json(folder / "results.json", *console.SHOWN)))
    return 0


def _train(command, folder: Path) -> int:
    run, state = _begin(command, folder)
    memory_used = {"compiled": _compiled(run, state)}
    earlier = memory.peak_memory()
    memory.forget_peak()
    training = _fit(run, state, command)
    if int(training.state.step) < run.total:
        print(f"stopped after step {int(training.state.step)} of {run.total}; the same command goes on from there")
        return 128 + training.signal
    memory_used |= memory.peak_memory()
    _finish(run, training, memory_used, earlier)
    return 0


def _begin(command, folder: Path) -> tuple[Run, TrainState]:
    """All that training needs, the metrics before it, and the state before its first step."""
    config, method = command.config, build_method(command.config)
    if config.log.tensorboard:
        tensorboard()  # an error before anything is loaded
    session = load_session(config, command.probe, method)
    batches, total = _batches(session, method)
    if method.prepare:
        method = method.prepare(session.model, session.base, _looked_at(batches, total))
    params = partitioning.init(method, jax.random.key(config.seed), session.base, session.mesh, session.model.sharding)
    counts = console.parameter_counts(method, session.base, params)
    print(console.parameter_line(*counts), flush=True)
    if processes.first():
        workdir.start(folder, config.to_dict(), command.overwrite)
    processes.barrier("workdir")
    fingerprint.settle(folder, batches.encoded, session.base)
    apply = session.bound(method)
    jax.eval_shape(apply, {"params": params}, np.zeros((1, 8), np.int32))  # an adapter that nothing reads stops here
    evaluate = session.evaluator(apply, session.dequantize(params))
    before = _before(folder, evaluate, params, config.eval.to_dict()) if config.eval.before else {}
    step, state, frozen = _start(session, method, apply, params, total)
    session = session._replace(base={})  # what does not train is in ``frozen``: a full run has no use for old weights
    return Run(folder=folder, session=session, method=method, batches=batches, total=total, counts=counts,
               evaluate=evaluate, before=before, step=step, frozen=frozen), state


def _batches(session: Session, method: Method) -> tuple[Batches, int]:
    """The training batches and the number of optimiser steps; says what is in them, and shows one example."""
    config, held_out = session.config, session.held_out
    encoded, happened = objective_of(config.task).encode(session.train, session.tokenizer, config.data)
    check_fits([*encoded, *held_out.encoded, *held_out.probe], session.model.config, method)
    batches = Batches(encoded, config.data, config.seed, config.optim.accumulate_steps,
                      row_multiple=row_shards(session.mesh))
    total = config.optim.steps or batches.num_steps(config.optim.epochs)
    print(f"training on {describe(happened)}")
    print(first_example(config.task, encoded, session.unused, session.tokenizer))
    notes = (unused_template(config.task, session.train, session.tokenizer),
             describe_stops(session.tokenizer) if objective_of(config.task).writes else "")
    for note in filter(None, notes):
        print(note)
    print(f"{total} steps; {100 * batches.describe()['efficiency']:.0f} % of each batch are real tokens", flush=True)
    return batches, total


def _looked_at(batches: Batches, total: int) -> list[dict[str, np.ndarray]]:
    """The batches that a method may see before training: the first ones of it, the same for a resumed run."""
    return [batches.at(step) for step in range(min(total, LOOKED_AT))]


def _before(folder: Path, evaluate, params, eval_config: dict[str, Any]) -> dict[str, float]:
    """The metrics before training; a resumed run reads those of when it was new, if it evaluates the same."""
    path, asked = folder / "before.json", settings.plain(eval_config)
    if processes.agreed(not path.exists() or workdir.read_json(path, "eval", "metrics")["eval"] != asked):
        print("evaluating before training", flush=True)
        metrics = evaluate(params)
        if processes.first():
            workdir.write_json(path, {"eval": asked, "metrics": metrics})
        return metrics
    return workdir.read_json(path)["metrics"]


def _start(session: Session, method: Method, apply: Callable, params: tree.Tree,
           total: int) -> tuple[Callable, TrainState, tree.Tree]:
    """(training step, state before the first one, frozen leaves)."""
    config, mesh, labels = session.config, session.mesh, method.labels(params)
    optimizer = build_optimizer(config.optim, total, labels, method.vectors, method.optimizer)
    trainable, frozen = tree.partition(params, labels)
    where = state_shardings(trainable, optimizer, mesh) if several(mesh) else None
    step = make_step(apply, optimizer, config.optim.loss_chunk, objective_of(config.task).error, method.penalty, mesh,
                     where)
    return step, init_state(trainable, optimizer, jax.random.key(config.seed), where), frozen


def _compiled(run: Run, state: TrainState) -> int:
    """Bytes that XLA says a step on the first batch needs of a device; the loop then finds it compiled."""
    batch = feed(run.session.mesh, at_step(run.batches, 0), axis=1)
    return memory_of(run.step.lower(state, run.frozen, batch).compile()).total


def _fit(run: Run, state: TrainState, command) -> Training:
    """Train from the newest checkpoint to the end or a request to stop."""
    config, evaluations, stop = run.session.config, {}, StopRequest()

    def evaluated(state: TrainState) -> dict[str, float]:
        metrics = evaluations[int(state.step)] = run.evaluate(tree.combine(run.frozen, state.trainable))
        say(console.metrics_line(int(state.step), metrics))
        return metrics

    checkpoints = Checkpoints(run.folder / "checkpoints", config.checkpoint.keep)
    state = checkpoints.restore(state)
    if int(state.step):
        print(f"resuming {run.folder} after step {int(state.step)} of {run.total}", flush=True)
    log = _log(run, int(state.step))
    if int(state.step) == run.total and not log.last:
        print("metrics.jsonl has no line: the seconds of training are not known, and counted as 0", flush=True)
    trace = Trace(run.folder / "profile", command.profile) if command.profile else None
    with runtime.quiet_writers(), contextlib.ExitStack() as stack:
        for one in filter(None, (trace, log, checkpoints)):
            stack.enter_context(contextlib.closing(one))
        state = fit(run.step, state, run.frozen, run.batches, total_steps=run.total,
                    schedule=build_schedule(config.optim, run.total), checkpoints=checkpoints, log=log,
                    checkpoint_due=_due(run, config.checkpoint), log_every=config.log.every, evaluate=evaluated,
                    evaluate_due=_due(run, config.eval), mesh=run.session.mesh, stop=stop,
                    guard=command.transfer_guard, trace=trace)  # fmt: skip
    return Training(state=state, seconds=log.last.get("seconds", 0.0), evaluations=evaluations, signal=stop.asked)


def _log(run: Run, step: int) -> MetricsLog:
    """The log of the first process; those of others write nothing."""
    if not processes.first():
        return MetricsLog(None, step)
    board = run.folder / "tensorboard" if run.session.config.log.tensorboard else None
    return MetricsLog(run.folder / "metrics.jsonl", step, board, LOGGED)


def _due(run: Run, section) -> Callable[[int], bool]:
    """After which steps ``section`` (``config.checkpoint`` or ``config.eval``) wants something to be done."""
    ends = {run.batches.num_steps(epoch + 1) for epoch in range(run.total)} if section.every_epoch else ()
    return due(section.every, ends)


def _finish(run: Run, training: Training, memory_used: dict[str, int], earlier: dict[str, int]) -> None:
    """Evaluate, save, and tell; ``earlier`` is the peak memory until training began."""
    params = tree.combine(run.frozen, training.state.trainable)
    after = training.evaluations.get(run.total) or run.evaluate(params)
    params = processes.brought(params, _saved_leaves(run.method, params))
    if processes.first():
        saved = _save(run, params)
        peak = {where: max(size, earlier[where]) for where, size in memory.peak_memory().items()}
        results = {"seconds": training.seconds, "training_memory": memory_used, "before": run.before, "after": after,
                   "steps": run.total, "trainable": run.counts[0], "all": run.counts[1], "peak_memory": peak,
                   "adapter": str(saved), "adapter_bytes": workdir.bytes_in(saved)}
        workdir.write_json(run.folder / "results.json", results)
    processes.barrier("saved")
    if processes.first():
        print("\n" + console.summary(results))


def _saved_leaves(method: Method, params: tree.Tree) -> Callable[[str], bool]:
    """Which leaves' values are in what is saved, by their paths: of an adapter those that train or are the method's."""
    labels = tree.flatten(method.labels(params))
    whole = not is_stored(method, params)
    return lambda path: whole or labels[path] != FROZEN or tree.owns(method.leaves, path)


def _save(run: Run, params: tree.Tree) -> Path:
    """Write what was trained: the adapter, or the whole model where the method has no adapter file."""
    session = run.session
    if is_stored(run.method, params):
        save_adapter(run.folder / "adapter", run.method, session.model, params, session.config.model.source)
        return run.folder / "adapter"
    save_pretrained(run.folder / "model", session.model, run.method.merge(params), session.tokenizer)
    return run.folder / "model"
