"""What ``run.py`` can be asked to do: train, eval, merge (export), generate.

Each prints for people and returns an exit code.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax import quant, sharding, tree
from peft_jax.data import Batches, encode_prompts
from peft_jax.data.sources import is_chat
from peft_jax.data.tokenize import describe
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import complete, make_evaluator
from peft_jax.evaluation.objectives import objective_of
from peft_jax.generation import Sampling
from peft_jax.hub import load_pretrained, load_tokenizer, save_pretrained
from peft_jax.hub.adapters import is_stored, load_adapter, save_adapter
from peft_jax.mesh import row_shards
from peft_jax.method import BASE, Method, bind
from peft_jax.methods import requantize
from peft_jax.train import hosts, plan, report, session, workdir
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.loop import StopRequest, Trace, due, fit
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
    workdir.check_writable(folder)
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
    before = _before(folder, evaluate, params, config.eval.to_dict())
    step, state, frozen = _start(config, method, apply, params, total, ready.mesh)
    ready = ready._replace(base={})  # what does not train is in ``frozen``: a full run has no use for the old weights
    del params
    stop = StopRequest()
    more = {"mesh": ready.mesh, "stop": stop, "guard": command.transfer_guard}
    if command.profile:
        more["trace"] = Trace(folder / "profile", command.profile)
    state, seconds, found = _train(config, folder, step, state, frozen, batches, total, evaluate, more)
    if int(state.step) < total:
        print(f"stopped after step {int(state.step)} of {total}; the same command goes on from there")
        return 128 + stop.asked

    params = tree.combine(frozen, state.trainable)
    after = found.get(total) or evaluate(params)
    params = hosts.brought(params)
    if not hosts.first():
        hosts.barrier("saved")
        return 0
    saved = _save(folder, method, params, ready, config)
    results = {"before": before, "after": after, "steps": total, "seconds": seconds}
    results |= {"trainable": counts[0], "all": counts[1], "peak_memory": report.peak_memory()}
    results |= {"adapter": str(saved), "adapter_bytes": _bytes_in(saved)}
    workdir.write_json(folder / "results.json", results)
    hosts.barrier("saved")
    print("\n" + report.summary(results))
    return 0


def _start(config, method: Method, apply, params, total: int, mesh) -> tuple[Callable, TrainState, tree.Tree]:
    """(training step, state before the first one, frozen leaves)."""
    labels = method.labels(params)
    optimizer = method.optimizer(make_optimizer(config.optim, total, labels), total)
    trainable, frozen = tree.partition(params, labels)
    where = None
    if mesh.size > 1:
        where = state_shardings(trainable, jax.tree.map(lambda leaf: leaf.sharding, trainable), optimizer, mesh)
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
        checkpoints.close()
        log.close()
    return state, log.last["seconds"], found


def _looked_at(batches: Batches, total: int) -> list[dict[str, np.ndarray]]:
    """The batches that a method may see before training: the first ones of it, the same for a resumed run."""
    return [batches.at(step) for step in range(min(total, LOOKED_AT))]


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Tuned(NamedTuple):
    """What a run has trained, ``"adapter"`` or a whole ``"model"``: how to apply it, and how to get plain weights."""

    name: str
    apply: Callable
    params: tree.Tree
    merge: Callable[[tree.Tree], tree.Tree] | None


def _tuned(folder: Path, config, model, base: tree.Tree) -> Tuned:
    if (folder / "adapter").is_dir():
        return _adapter(folder / "adapter", model, base)
    _, params = load_pretrained(folder / "model", dtype=config.model.param_dtype)
    return Tuned("model", model.apply, params, lambda params: params)


def _adapter(source: str | Path, model, base: tree.Tree) -> Tuned:
    method, params = load_adapter(source, base)
    return Tuned("adapter", bind(method, model), params, method.merge)


def evaluate(command) -> int:
    """The base model and what the workdir's run trained side by side; also written to ``eval.json``."""
    folder = _trained(command)
    ready = session.load(command.config, command.probe, session.trained_on(command.config))
    tuned = _tuned(folder, command.config, ready.model, ready.base)
    found = {}
    for name, apply, params in (("base", bind(BASE, ready.model), ready.base), (tuned.name, tuned.apply, tuned.params)):
        run = make_evaluator(apply, ready.model, ready.tokenizer, ready.held, command.config, ready.mesh)
        found[name] = run(params)
    workdir.write_json(folder / "eval.json", found)
    print(report.metrics_table(found))
    return 0


def merge(command) -> int:
    """Fold the workdir's adapter into the weights: a folder that transformers loads."""
    folder, source = _trained(command), command.config.model.source
    output = Path(command.output).expanduser() if command.output else folder / "merged"
    if output.exists() and Path(source).expanduser().exists() and output.samefile(Path(source).expanduser()):
        raise PeftJaxError(f"--output={output} is the base model itself: choose another folder")
    changes, ready = session.trained_on(command.config), None
    if command.requantize:
        ready = session.load(command.config, command.probe, changes)
        tokenizer, model, base = ready.tokenizer, ready.model, ready.base
    else:
        tokenizer, (model, base) = load_tokenizer(source), session.load_model(command.config, changes)
    tuned = _tuned(folder, command.config, model, base)
    if tuned.merge is None:
        raise PeftJaxError(f"{folder / 'adapter'} is of a method that cannot be folded into weights: use it as it is")
    merged = tree.map_paths(lambda _, leaf: quant.plain(leaf), tuned.merge(tuned.params))  # also what has no adapter
    if ready:
        merged = _requantized(command.config, ready, merged)
    save_pretrained(output, model, merged, tokenizer)
    print(f"merged model: {output} ({report.size(_bytes_in(output))})")
    return 0


def _requantized(config, ready: Session, merged: tree.Tree) -> tree.Tree:
    """``merged`` in the base's codes again; prints what that costs, leaf by leaf and in the metrics of the task."""
    again, errors = requantize(merged, ready.base)
    if not errors:
        raise PeftJaxError("--requantize: the base of this run is not quantised: leave it out")
    print("relative error that quantising adds again:")
    for path, error in sorted(errors.items(), key=lambda item: -item[1]):
        print(f"  {error:.4f}  {path}")
    run = make_evaluator(bind(BASE, ready.model), ready.model, ready.tokenizer, ready.held, config)
    print(report.metrics_table({"merged": run(merged), "quantised": run(again)}), flush=True)
    return again


def generate(command) -> int:
    """Continue prompts with the base model and with what the workdir's run trained, or with the named adapters."""
    config = command.config
    if not objective_of(config.task).writes:
        raise PeftJaxError(f"the task {config.task.name!r} is answered by a head, which writes no text: see "
                           "--mode=eval for what it tells")
    if not command.adapters:
        _trained(command)  # an error before anything is loaded
    if command.prompts:
        tokenizer = load_tokenizer(config.model.source)
        model, base = session.load_model(config, session.trained_on(config))
        examples = [_as_asked(prompt, config.task) for prompt in command.prompts]
    else:
        ready = session.load(config, method=session.trained_on(config))
        tokenizer, model, base = ready.tokenizer, ready.model, ready.base
        examples = [_opening(example) for example in ready.held.examples[: config.generate.num_prompts]]
    prompts = encode_prompts(examples, tokenizer)
    options = {"batch_size": len(prompts), "width_multiple": config.data.width_multiple}
    options |= {"max_new_tokens": config.generate.max_new_tokens, "rng": jax.random.key(config.seed)}
    options |= {"sampling": Sampling(*(config.generate[key] for key in Sampling._fields))}
    answers = {"base": complete(bind(BASE, model), model, base, prompts, tokenizer, **options)}
    for name, tuned in _candidates(command, model, base).items():
        answers[name] = complete(tuned.apply, model, tuned.params, prompts, tokenizer, **options)
    for prompt, texts in zip(prompts, zip(*answers.values(), strict=True), strict=True):
        print(report.answers(tokenizer.decode(prompt), dict(zip(answers, texts, strict=True))))
    return 0


def _candidates(command, model, base: tree.Tree) -> dict[str, Tuned]:
    """What to try beside the base, by the name to show: the adapters of the command line or what the run trained."""
    if not command.adapters:
        tuned = _tuned(_trained(command), command.config, model, base)
        return {tuned.name: tuned}
    short = [Path(source).parent.name if Path(source).name == "adapter" else Path(source).name
             for source in command.adapters]
    unlike = len(set(short)) == len(short) and "base" not in short
    return {name: _adapter(source, model, base) for name, source in
            zip(short if unlike else command.adapters, command.adapters, strict=True)}


def _as_asked(prompt: str, task) -> dict[str, Any]:
    """A prompt of the command line in the form that the task trains on: as it is, or as the user's turn of a chat."""
    if is_chat(task):
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _opening(example: dict[str, Any], words: int = 8) -> dict[str, Any]:
    """What to continue: a question as it is; of plain text its first words."""
    return {"prompt": " ".join(example["text"].split(" ")[:words])} if "text" in example else example


def _trained(command) -> Path:
    """The workdir, if it holds an adapter, or a whole model, trained from the model of the configuration."""
    folder = Path(command.workdir)
    if not any((folder / name).is_dir() for name in ("adapter", "model")):
        raise PeftJaxError(f"{folder} holds no adapter: train one first (the same command with --mode=train)")
    workdir.check_config(folder, command.config.to_dict(), workdir.ADAPTER_MATTERS)
    return folder


JOBS = {"train": train, "eval": evaluate, "merge": merge, "export": merge, "generate": generate, "plan": plan.job}
