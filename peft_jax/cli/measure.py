"""``--mode=measure``: what a run is worth, on held-out data, neighbouring tasks and general text, and in time."""

from pathlib import Path
from typing import Any

from peft_jax import quant
from peft_jax.binding.linen import bind
from peft_jax.cli import console, session, trained_run, workdir
from peft_jax.cli.session import Session
from peft_jax.core import settings, tree
from peft_jax.data import load_examples
from peft_jax.data.sources import sample_by_hash
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import hold_out, make_evaluator_of_any
from peft_jax.evaluation.latency import latency
from peft_jax.method import BASE

MEASURED = "measured.json"
ASKED = ("model", "method", "task", "data", "eval", "measure")  # what a measurement is of


def job(command) -> int:
    """Measure what the workdir's run trained, or with ``measure.of=base`` the model as it was; into ``measured.json``.

    What was measured with these settings before is not measured again.
    """
    config, folder = command.config, Path(command.workdir)
    asked = settings.plain({name: config[name].to_dict() for name in ASKED})
    path = folder / MEASURED
    if command.overwrite or not path.exists() or workdir.read_json(path, "asked")["asked"] != asked:
        found = measured(command)
        folder.mkdir(parents=True, exist_ok=True)
        workdir.write_json(path, {"asked": asked, **found})
    print(table(workdir.read_json(path, "test", "general", "neighbours", "latency")))
    return 0


def measured(command) -> dict[str, Any]:
    """``{"test": metrics, "general" and "neighbours": {task: metrics}, "latency": {variant: seconds}}``."""
    config = command.config.copy_and_resolve_references()
    config.eval.update(part="test", limit=config.measure.limit)
    alone = config.measure.of == "base"
    ready = session.load(config, None, BASE if alone else session.trained_on(config))
    if alone:
        what = trained_run.Tuned("base", bind(BASE, ready.model, ready.mesh), ready.base, None)
    else:
        what = trained_run.load(trained_run.folder_of(command), config, ready.model, ready.base, ready.mesh)
    evaluate = make_evaluator_of_any(what.apply, ready.model, ready.tokenizer, config, ready.mesh)
    found = {"test": evaluate(what.params, ready.held, config.task)}
    for kind, limit in (("general", config.measure.general_limit), ("neighbours", config.measure.neighbour_limit)):
        tasks = {name: command.tasks[name] for name in config.measure[kind]}
        found[kind] = {name: evaluate(what.params, _held(ready, config, task, limit), task)
                       for name, task in tasks.items()}  # by the given name: all files are the task "file"
    return {**found, "latency": _latency(config, ready, what) if hasattr(ready.model, "init_cache") else {}}


def _held(ready: Session, config, task, limit: int):
    """The held-out examples of another task, whichever half."""
    examples = sample_by_hash(load_examples(task)["validation"], limit)
    if task.answer != config.task.answer:
        raise PeftJaxError(f"measure: the task {task.name!r} is answered otherwise (task.answer={task.answer}) than "
                           f"{config.task.name!r} ({config.task.answer}): leave it out of config.measure")
    held = hold_out(examples, [], ready.tokenizer, task, config.data)
    session.check_fits(held.encoded, ready.model.config)
    return held


def _latency(config, ready: Session, what: trained_run.Tuned) -> dict[str, dict[str, float]]:
    """Of the plain base, of what was trained as it is, and of it merged into plain weights, in turn."""
    base = ready.base
    if any(quant.is_leaf(leaf) for leaf in tree.flatten(base).values()):
        base = session.load_model(config, BASE, ready.mesh)[1]
    plain = bind(BASE, ready.model, ready.mesh)
    variants = {"base": (plain, base)}
    if what.params is not ready.base:
        variants["unmerged"] = (what.apply, what.params)
        if what.merge:
            variants["merged"] = (plain, what.merged())
    m = config.measure
    return latency(variants, ready.model, prompt_tokens=m.prompt_tokens, new_tokens=m.new_tokens, rows=m.rows,
                   repeats=m.repeats)


def table(found: dict[str, Any]) -> str:
    """What was measured, for people."""
    columns = {"test": found["test"], **found["neighbours"], **found["general"]}
    lines = [console.metrics_table(columns), ""]
    lines += [f"{name + ':':<10} {1e3 * one['prefill']:8.1f} ms until the first token, {1e3 * one['token']:7.2f} ms "
              "for each after it" for name, one in found["latency"].items()]
    return "\n".join(lines)
