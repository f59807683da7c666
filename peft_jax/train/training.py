"""``--mode=train``: evaluate, train, evaluate, save; what was interrupted goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peft_jax import sharding, tree
from peft_jax.data import Batches
from peft_jax.data.tokenize import describe
from peft_jax.evaluation.evaluate import make_evaluator
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import save_pretrained
from peft_jax.hub.adapters import is_stored, save_adapter
from peft_jax.mesh import feed, row_shards
from peft_jax.method import Method, bind
from peft_jax.planner.program import memory_of
from peft_jax.train import hosts, report, session, workdir
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.loop import StopRequest, Trace, at_step, due, fit
from peft_jax.train.metrics import MetricsLog
from peft_jax.train.optim import make_optimizer, make_schedule
from peft_jax.train.session import Session
from peft_jax.train.step import TrainState, init_state, make_step, state_shardings

LOOKED_AT = 8  # batches


def train(command) -> int:
    """Train, evaluate before and after, save; goes on where an interrupted run of the workdir stopped."""
    with hosts.one_voice():
        return _train_run(command)


def _train_run(command) -> int:
    config, folder = command.config, Path(command.workdir)
    hosts.check_alike({**config.to_dict(), "--overwrite": command.overwrite})
    workdir.check_writable(folder, leave=jax.process_count() > 1)
    if not command.overwrite:
        workdir.check_config(folder, config.to_dict())
        if hosts.agreed((folder / "results.json").exists()):
            return _already_done(folder)
    method = session.build_method(config)
    ready = session.load(config, command.probe, method)
    batches, total = _batches(config, ready, method)
    if method.prepare:
        method = method.prepare(ready.model, ready.base, _looked_at(batches, total))
    params = sharding.init(method, jax.random.key(config.seed), ready.base, ready.mesh, ready.model.sharding)
    counts = report.parameter_counts(method, ready.base, params)
    print(report.parameter_line(*counts), flush=True)
    if hosts.first():
        workdir.start(folder, config.to_dict(), command.overwrite)
    hosts.barrier("workdir")

    apply = bind(method, ready.model, ready.mesh)
    jax.eval_shape(apply, {"params": params}, np.zeros((1, 8), np.int32))  # an adapter that nothing reads stops here
    evaluate = make_evaluator(apply, ready.model, ready.tokenizer, ready.held, config, ready.mesh)
    before = _before(folder, evaluate, params, config.eval.to_dict()) if config.eval.before else {}
    step, state, frozen = _start(config, method, apply, params, total, ready.mesh)
    ready = ready._replace(base={})  # what does not train is in ``frozen``: a full run has no use for the old weights
    del params
    needed, earlier = _compiled(step, state, frozen, batches, ready.mesh), report.peak_memory()
    report.forget_peak()
    stop = StopRequest()
    more = {"mesh": ready.mesh, "stop": stop, "guard": command.transfer_guard}
    more["trace"] = Trace(folder / "profile", command.profile) if command.profile else None
    state, seconds, found = _train(config, folder, step, state, frozen, batches, total, evaluate, more)
    if int(state.step) < total:
        print(f"stopped after step {int(state.step)} of {total}; the same command goes on from there")
        return 128 + stop.asked

    training = report.peak_memory()
    params = tree.combine(frozen, state.trainable)
    after = found.get(total) or evaluate(params)
    params = hosts.brought(params)
    if not hosts.first():
        hosts.barrier("saved")
        return 0
    saved = _save(folder, method, params, ready, config)
    results = {"before": before, "after": after, "steps": total, "seconds": seconds}
    peak = {where: max(size, earlier[where]) for where, size in report.peak_memory().items()}
    results |= {"trainable": counts[0], "all": counts[1], "peak_memory": peak}
    results |= {"training_memory": {**training, "compiled": needed}}
    results |= {"adapter": str(saved), "adapter_bytes": workdir.bytes_in(saved)}
    workdir.write_json(folder / "results.json", results)
    hosts.barrier("saved")
    print("\n" + report.summary(results))
    return 0


def _compiled(step, state: TrainState, frozen: tree.Tree, batches: Batches, mesh) -> int:
    """Bytes that XLA says a step on the first batch needs of a device; the loop then finds it compiled."""
    return memory_of(step.lower(state, frozen, feed(mesh, at_step(batches, 0), axis=1)).compile()).total


def _start(config, method: Method, apply, params, total: int, mesh) -> tuple[Callable, TrainState, tree.Tree]:
    """(training step, state before the first one, frozen leaves)."""
    labels = method.labels(params)
    optimizer = method.optimizer(make_optimizer(config.optim, total, labels), total)
    trainable, frozen = tree.partition(params, labels)
    where = state_shardings(trainable, optimizer, mesh) if mesh.size > 1 else None
    step = make_step(apply, optimizer, config.optim.loss_chunk, objective_of(config.task).error, method.penalty, mesh,
                     where)
    return step, init_state(trainable, optimizer, jax.random.key(config.seed), where), frozen


def _save(folder: Path, method: Method, params: tree.Tree, ready: Session, config) -> Path:
    """Write what was trained: the adapter, or the whole model where the method has no adapter file."""
    if is_stored(method, params):
        save_adapter(folder / "adapter", method, params, ready.model, config.model.source)
        return folder / "adapter"
    save_pretrained(folder / "model", ready.model, method.merge(params), ready.tokenizer)
    return folder / "model"


def _already_done(folder: Path) -> int:
    print(f"{folder} holds this run, finished; nothing is left to train. --mode=eval evaluates it again, --overwrite "
          "trains it again. Its results:\n")  # fmt: skip
    print(report.summary(workdir.read_json(folder / "results.json", *report.SHOWN)))
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


def _before(folder: Path, evaluate, params, settings: dict[str, Any]) -> dict[str, float]:
    """The metrics before training; a resumed run reads what was found when it was new, if it evaluates the same."""
    path, asked = folder / "before.json", workdir.plain(settings)
    if hosts.agreed(not path.exists() or workdir.read_json(path, "eval", "metrics")["eval"] != asked):
        print("evaluating before training", flush=True)
        metrics = evaluate(params)
        if hosts.first():
            workdir.write_json(path, {"eval": asked, "metrics": metrics})
        return metrics
    return workdir.read_json(path)["metrics"]


def _train(config, folder: Path, step, state: TrainState, frozen, batches: Batches, total: int, evaluate, more):
    """(state, seconds of training, metrics by step of evaluations on the way) after training or a request to stop."""
    found: dict[int, dict[str, float]] = {}

    def evaluated(state: TrainState) -> dict[str, float]:
        found[int(state.step)] = evaluate(tree.combine(frozen, state.trainable))
        print(report.metrics_line(*list(found.items())[-1]), flush=True)
        return found[int(state.step)]

    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    state = checkpoints.restore(state)
    if int(state.step):
        print(f"resuming {folder} after step {int(state.step)} of {total}", flush=True)
    log = MetricsLog(folder if hosts.first() else None, int(state.step), config.log.tensorboard)
    ends = {batches.num_steps(epoch + 1) for epoch in range(total)}
    checkpoint_due, evaluate_due = (due(part.every, ends if part.every_epoch else ())
                                    for part in (config.checkpoint, config.eval))
    try:
        state = fit(step, state, frozen, batches, total_steps=total, schedule=make_schedule(config.optim, total),
                    checkpoints=checkpoints, log=log, checkpoint_due=checkpoint_due, log_every=config.log.every,
                    evaluate=evaluated, evaluate_due=evaluate_due, **more)  # fmt: skip
    finally:
        for one in (checkpoints, log, more["trace"]):
            if one:
                one.close()
    return state, log.last["seconds"], found


def _looked_at(batches: Batches, total: int) -> list[dict[str, np.ndarray]]:
    """The batches that a method may see before training: the first ones of it, the same for a resumed run."""
    return [batches.at(step) for step in range(min(total, LOOKED_AT))]
