"""What ``run.py`` can be asked to do: train, eval, merge, generate. Each prints for people and returns an exit code."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from peft_jax import tree
from peft_jax.data import Batches, encode_all, encode_prompts
from peft_jax.data.sources import is_chat
from peft_jax.data.tokenize import describe
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import complete, make_evaluator
from peft_jax.generation import Sampling
from peft_jax.hub import load_tokenizer, save_pretrained
from peft_jax.hub.adapters import load_adapter, save_adapter
from peft_jax.method import Method, bind
from peft_jax.train import report, session, workdir
from peft_jax.train.checkpoint import Checkpoints
from peft_jax.train.loop import fit
from peft_jax.train.metrics import MetricsLog
from peft_jax.train.optim import make_optimizer, make_schedule
from peft_jax.train.session import Session
from peft_jax.train.step import TrainState, init_state, make_step

LOOKED_AT = 8  # batches


def train(command) -> int:
    """Train, evaluate before and after, save the adapter; goes on where an interrupted run of the workdir stopped."""
    config, folder = command.config, Path(command.workdir)
    workdir.check_writable(folder)
    if not command.overwrite:
        workdir.check_config(folder, config.to_dict())
        if (folder / "results.json").exists():
            return _already_done(folder)
    method, ready = session.build_method(config), session.load(config, command.probe)
    batches, total = _batches(config, ready)
    if method.prepare:
        method = method.prepare(ready.model, ready.base, _looked_at(batches, total))
    params = method.init(jax.random.key(config.seed), ready.base)
    counts = report.parameter_counts(method, ready.base, params)
    print(report.parameter_line(*counts), flush=True)
    workdir.start(folder, config.to_dict(), command.overwrite)

    apply = bind(method, ready.model)
    jax.eval_shape(apply, {"params": params}, np.zeros((1, 8), np.int32))  # an adapter that nothing reads stops here
    evaluate = make_evaluator(apply, ready.model, ready.tokenizer, ready.held, config)
    before = _before(folder, evaluate, params, config.eval.to_dict())
    state, frozen, seconds = _train(config, folder, method, apply, params, batches, total)
    if int(state.step) < total:
        print(f"stopped after step {int(state.step)} of {total}; the same command goes on from there")
        return 130

    params = tree.combine(frozen, state.trainable)
    save_adapter(folder / "adapter", method, params, ready.model, config.model.source)
    results = {"before": before, "after": evaluate(params), "steps": total, "seconds": seconds}
    results |= {"trainable": counts[0], "all": counts[1], "peak_memory": report.peak_memory()}
    results |= {"adapter": str(folder / "adapter"), "adapter_bytes": _bytes_in(folder / "adapter")}
    workdir.write_json(folder / "results.json", results)
    print("\n" + report.summary(results))
    return 0


def _already_done(folder: Path) -> int:
    print(f"{folder} holds this run, finished; nothing is left to train. --mode=eval evaluates it again, --overwrite "
          "trains it again. Its results:\n")  # fmt: skip
    print(report.summary(workdir.read_json(folder / "results.json", *report.SHOWN)))
    return 0


def _batches(config, ready: Session) -> tuple[Batches, int]:
    """The training batches and the number of optimiser steps; says what is in them."""
    encoded, happened = encode_all(ready.train, ready.tokenizer, config.data)
    session.check_fits(encoded, ready.model.config)
    batches = Batches(encoded, config.data, config.seed, config.optim.accumulate_steps)
    total = config.optim.steps or batches.num_steps(config.optim.epochs)
    print(f"training on {describe(happened)}")
    print(f"{total} steps; {100 * batches.describe()['efficiency']:.0f} % of each batch are real tokens", flush=True)
    return batches, total


def _before(folder: Path, evaluate, params, settings: dict[str, Any]) -> dict[str, float]:
    """The metrics before training; a resumed run reads what was found when it was new, if it evaluates the same."""
    path, asked = folder / "before.json", workdir.plain(settings)
    if not path.exists() or workdir.read_json(path, "eval", "metrics")["eval"] != asked:
        print("evaluating before training", flush=True)
        workdir.write_json(path, {"eval": asked, "metrics": evaluate(params)})
    return workdir.read_json(path)["metrics"]


def _train(config, folder: Path, method: Method, apply, params, batches, total) -> tuple[TrainState, tree.Tree, float]:
    """(state, frozen leaves, seconds of training) after training or a request to stop."""
    labels = method.labels(params)
    optimizer = make_optimizer(config.optim, total, labels)
    trainable, frozen = tree.partition(params, labels)
    checkpoints = Checkpoints(folder / "checkpoints", config.checkpoint.keep)
    state = checkpoints.restore(init_state(trainable, optimizer, jax.random.key(config.seed)))
    if int(state.step):
        print(f"resuming {folder} after step {int(state.step)} of {total}", flush=True)
    log = MetricsLog(folder, int(state.step), config.log.tensorboard)
    try:
        state = fit(make_step(apply, optimizer, config.optim.loss_chunk), state, frozen, batches, total_steps=total,
                    schedule=make_schedule(config.optim, total), checkpoints=checkpoints, log=log,
                    checkpoint_every=config.checkpoint.every, log_every=config.log.every)  # fmt: skip
    finally:
        checkpoints.close()
        log.close()
    return state, frozen, log.last["seconds"]


def _looked_at(batches: Batches, total: int) -> list[dict[str, np.ndarray]]:
    """The batches that a method may see before training: the first ones of it, the same for a resumed run."""
    return [batches.at(step) for step in range(min(total, LOOKED_AT))]


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def evaluate(command) -> int:
    """The base model and the workdir's adapter side by side; also written to ``eval.json``."""
    folder = _trained(command)
    ready = session.load(command.config, command.probe)
    method, params = load_adapter(folder / "adapter", ready.base)
    found = {}
    for name, apply, tree_ in (("base", ready.model.apply, ready.base), ("adapter", bind(method, ready.model), params)):
        run = make_evaluator(apply, ready.model, ready.tokenizer, ready.held, command.config)
        found[name] = run(tree_)
    workdir.write_json(folder / "eval.json", found)
    print(report.metrics_table(found))
    return 0


def merge(command) -> int:
    """Fold the workdir's adapter into the weights: a folder that transformers loads."""
    folder = _trained(command)
    tokenizer = load_tokenizer(command.config.model.source)
    model, base = session.load_model(command.config)
    method, params = load_adapter(folder / "adapter", base)
    if method.merge is None:
        raise PeftJaxError(f"{folder / 'adapter'} is of a method that cannot be folded into weights: use it as it is")
    save_pretrained(folder / "merged", model, method.merge(params), tokenizer)
    print(f"merged model: {folder / 'merged'} ({report.size(_bytes_in(folder / 'merged'))})")
    return 0


def generate(command) -> int:
    """Continue prompts with the base model and with the workdir's adapter."""
    folder, config = _trained(command), command.config
    if command.prompts:
        tokenizer, (model, base) = load_tokenizer(config.model.source), session.load_model(config)
        examples = [_as_asked(prompt, config.task) for prompt in command.prompts]
    else:
        ready = session.load(config)
        tokenizer, model, base = ready.tokenizer, ready.model, ready.base
        examples = [_opening(example) for example in ready.held.examples[: config.generate.num_prompts]]
    method, params = load_adapter(folder / "adapter", base)
    prompts = encode_prompts(examples, tokenizer)
    options = {"batch_size": len(prompts), "width_multiple": config.data.width_multiple}
    options |= {"max_new_tokens": config.generate.max_new_tokens, "rng": jax.random.key(config.seed)}
    options |= {"sampling": Sampling(*(config.generate[key] for key in Sampling._fields))}
    plain = complete(model.apply, model, base, prompts, tokenizer, **options)
    tuned = complete(bind(method, model), model, params, prompts, tokenizer, **options)
    for prompt, one, other in zip(prompts, plain, tuned, strict=True):
        print(f"{tokenizer.decode(prompt)}\n  base:    {one.strip()!r}\n  adapter: {other.strip()!r}\n")
    return 0


def _as_asked(prompt: str, task) -> dict[str, Any]:
    """A prompt of the command line in the form that the task trains on: as it is, or as the user's turn of a chat."""
    if is_chat(task):
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _opening(example: dict[str, Any], words: int = 8) -> dict[str, Any]:
    """What to continue: a question as it is; of plain text its first words."""
    return {"prompt": " ".join(example["text"].split(" ")[:words])} if "text" in example else example


def _trained(command) -> Path:
    """The workdir, if it holds an adapter for the model of the configuration."""
    folder = Path(command.workdir)
    if not (folder / "adapter").is_dir():
        raise PeftJaxError(f"{folder} holds no adapter: train one first (the same command with --mode=train)")
    workdir.check_config(folder, command.config.to_dict(), workdir.ADAPTER_MATTERS)
    return folder


JOBS = {"train": train, "eval": evaluate, "merge": merge, "generate": generate}
