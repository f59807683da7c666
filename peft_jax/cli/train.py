"""``--mode=train``: evaluate, train, evaluate, save; what was interrupted goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.binding.linen import bind
from peft_jax.cli import console, session, workdir
from peft_jax.cli.session import Session
from peft_jax.core import settings, tree
from peft_jax.data import Batches
from peft_jax.data.tokenize import describe
from peft_jax.evaluation.evaluate import make_evaluator
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub.adapters.save import is_stored, save_adapter
from peft_jax.hub.save import save_pretrained
from peft_jax.method import Method
from peft_jax.parallel import partitioning, processes
from peft_jax.parallel.mesh import feed, row_shards, several
from peft_jax.planner.compiled import memory_of
from peft_jax.train import memory
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.loop import StopRequest, Trace, at_step, due, fit
from peft_jax.train.metrics_log import MetricsLog
from peft_jax.train.optimizer import make_optimizer, make_schedule
from peft_jax.train.step import TrainState, init_state, make_step, state_shardings

LOOKED_AT = 8  # batches


def train(command) -> int:
    """Train, evaluate before and after, save; goes on where an interrupted run of the workdir stopped."""
    with processes.one_voice():
        return _train_run(command)


class Run(NamedTuple):
    """What stays as it is while a run trains. counts: (trainable, all) parameters. before: metrics, {} for none."""

    folder: Path
    config: Any
    method: Method
    ready: Session
    batches: Batches
    total: int
    counts: tuple[int, int]
    evaluate: Callable
    before: dict[str, float]
    step: Callable
    frozen: tree.Tree


def _train_run(command) -> int:
    config, folder = command.config, Path(command.workdir)
    processes.check_alike({**config.to_dict(), "--overwrite": command.overwrite})
    workdir.check_writable(folder, leave=jax.process_count() > 1)
    if not command.overwrite:
        workdir.check_config(folder, config.to_dict())
        if processes.agreed((folder / "results.json").exists()):
            return _already_done(folder)
    run, state = _begun(command, folder)
    bytes_used = {"compiled": _compiled(run, state)}
    earlier = memory.peak_memory()
    memory.forget_peak()
    stop = StopRequest()
    trace = Trace(folder / "profile", command.profile) if command.profile else None
    state, seconds, found = _train(run, state, trace, mesh=run.ready.mesh, stop=stop, guard=command.transfer_guard)
    if int(state.step) < run.total:
        print(f"stopped after step {int(state.step)} of {run.total}; the same command goes on from there")
        return 128 + stop.asked
    bytes_used |= memory.peak_memory()
    return _finished(run, state, {"seconds": seconds, "training_memory": bytes_used}, found, earlier)


def _begun(command, folder: Path) -> tuple[Run, TrainState]:
    """All that training needs, the metrics before it, and the state before its first step."""
    config, method = command.config, session.build_method(command.config)
    ready = session.load(config, command.probe, method)
    batches, total = _batches(config, ready, method)
    if method.prepare:
        method = method.prepare(ready.model, ready.base, _looked_at(batches, total))
    params = partitioning.init(method, jax.random.key(config.seed), ready.base, ready.mesh, ready.model.sharding)
    counts = console.parameter_counts(method, ready.base, params)
    print(console.parameter_line(*counts), flush=True)
    if processes.first():
        workdir.start(folder, config.to_dict(), command.overwrite)
    processes.barrier("workdir")

    apply = bind(method, ready.model, ready.mesh)
    jax.eval_shape(apply, {"params": params}, np.zeros((1, 8), np.int32))  # an adapter that nothing reads stops here
    evaluate = make_evaluator(apply, ready.model, ready.tokenizer, ready.held, config, ready.mesh)
    before = _before(folder, evaluate, params, config.eval.to_dict()) if config.eval.before else {}
    step, state, frozen = _start(config, method, apply, params, total, ready.mesh)
    ready = ready._replace(base={})  # what does not train is in ``frozen``: a full run has no use for the old weights
    return Run(folder, config, method, ready, batches, total, counts, evaluate, before, step, frozen), state


def _finished(run: Run, state: TrainState, results: dict[str, Any], found, earlier: dict[str, int]) -> int:
    """Evaluate, save, and tell; ``found`` are the metrics of evaluations on the way, ``earlier`` the peak memory until
    training began."""
    params = tree.combine(run.frozen, state.trainable)
    after = found.get(run.total) or run.evaluate(params)
    params = processes.brought(params)
    if processes.first():
        saved = _save(run.folder, run.method, params, run.ready, run.config)
        peak = {where: max(size, earlier[where]) for where, size in memory.peak_memory().items()}
        results |= {"before": run.before, "after": after, "steps": run.total, "trainable": run.counts[0],
                    "all": run.counts[1], "peak_memory": peak, "adapter": str(saved),
                    "adapter_bytes": workdir.bytes_in(saved)}
        workdir.write_json(run.folder / "results.json", results)
    processes.barrier("saved")
    if processes.first():
        print("\n" + console.summary(results))
    return 0


def _compiled(run: Run, state: TrainState) -> int:
    """Bytes that XLA says a step on the first batch needs of a device; the loop then finds it compiled."""
    laid = feed(run.ready.mesh, at_step(run.batches, 0), axis=1)
    return memory_of(run.step.lower(state, run.frozen, laid).compile()).total


def _start(config, method: Method, apply, params, total: int, mesh) -> tuple[Callable, TrainState, tree.Tree]:
    """(training step, state before the first one, frozen leaves)."""
    labels = method.labels(params)
    optimizer = method.optimizer(make_optimizer(config.optim, total, labels), total)
    trainable, frozen = tree.partition(params, labels)
    where = state_shardings(trainable, optimizer, mesh) if several(mesh) else None
    step = make_step(apply, optimizer, config.optim.loss_chunk, objective_of(config.task).error, method.penalty, mesh,
                     where)
    return step, init_state(trainable, optimizer, jax.random.key(config.seed), where), frozen


def _save(folder: Path, method: Method, params: tree.Tree, ready: Session, config) -> Path:
    """Write what was trained: the adapter, or the whole model where the method has no adapter file."""
    if is_stored(method, params):
        save_adapter(folder / "adapter", method, ready.model, params, config.model.source)
        return folder / "adapter"
    save_pretrained(folder / "model", ready.model, method.merge(params), ready.tokenizer)
    return folder / "model"


def _already_done(folder: Path) -> int:
    print(f"{folder} holds this run, finished; nothing is left to train. --mode=eval evaluates it again, --overwrite "
          "trains it again. Its results:\n")  # fmt: skip
    print(console.summary(workdir.read_json(folder / "results.json", *console.SHOWN)))
    return 0


def _batches(config, ready: Session, method: Method) -> tuple[Batches, int]:
    """The training batches and the number of optimiser steps; says what is in them."""
    encoded, happened = objective_of(config.task).encode(ready.train, ready.tokenizer, config.data)
    session.check_fits([*encoded, *ready.held.encoded, *ready.held.probe], ready.model.config, method)
    batches = Batches(encoded, config.data, config.seed, config.optim.accumulate_steps,
                      row_multiple=row_shards(ready.mesh))
    total = config.optim.steps or batches.num_steps(config.optim.epochs)
    print(f"training on {describe(happened)}")
    print(f"{total} steps; {100 * batches.describe()['efficiency']:.0f} % of each batch are real tokens", flush=True)
    return batches, total


def _before(folder: Path, evaluate, params, eval_config: dict[str, Any]) -> dict[str, float]:
    """The metrics before training; a resumed run reads what was found when it was new, if it evaluates the same."""
    path, asked = folder / "before.json", settings.plain(eval_config)
    if processes.agreed(not path.exists() or workdir.read_json(path, "eval", "metrics")["eval"] != asked):
        print("evaluating before training", flush=True)
        metrics = evaluate(params)
        if processes.first():
            workdir.write_json(path, {"eval": asked, "metrics": metrics})
        return metrics
    return workdir.read_json(path)["metrics"]


def _train(run: Run, state: TrainState, trace: Trace | None, **more):
    """(state, seconds of training, metrics by step of evaluations on the way) after training or a request to stop."""
    config, found = run.config, {}

    def evaluated(state: TrainState) -> dict[str, float]:
        found[int(state.step)] = run.evaluate(tree.combine(run.frozen, state.trainable))
        print(console.metrics_line(*list(found.items())[-1]), flush=True)
        return found[int(state.step)]

    checkpoints = Checkpoints(run.folder / "checkpoints", config.checkpoint.keep)
    state = checkpoints.restore(state)
    if int(state.step):
        print(f"resuming {run.folder} after step {int(state.step)} of {run.total}", flush=True)
    log = MetricsLog(run.folder if processes.first() else None, int(state.step), config.log.tensorboard)
    ends = {run.batches.num_steps(epoch + 1) for epoch in range(run.total)}
    checkpoint_due, evaluate_due = (due(part.every, ends if part.every_epoch else ())
                                    for part in (config.checkpoint, config.eval))
    try:
        state = fit(run.step, state, run.frozen, run.batches, total_steps=run.total,
                    schedule=make_schedule(config.optim, run.total), checkpoints=checkpoints, log=log,
                    checkpoint_due=checkpoint_due, log_every=config.log.every, evaluate=evaluated,
                    evaluate_due=evaluate_due, trace=trace, **more)  # fmt: skip
    finally:
        for one in filter(None, (checkpoints, log, trace)):
            one.close()
    return state, log.last["seconds"], found


def _looked_at(batches: Batches, total: int) -> list[dict[str, np.ndarray]]:
    """The batches that a method may see before training: the first ones of it, the same for a resumed run."""
    return [batches.at(step) for step in range(min(total, LOOKED_AT))]
