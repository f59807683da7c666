"""``--mode=measure``: what a run is worth, on held-out data, neighbouring tasks and general text, and in time."""

from pathlib import Path
from typing import Any

from peft_jax import quant
from peft_jax.cli import console, trained_run, workdir
from peft_jax.cli.build_method import trained_on
from peft_jax.cli.checks import check_fits
from peft_jax.cli.load_data import data_set
from peft_jax.cli.load_model import load_model
from peft_jax.cli.session import Session, load_session
from peft_jax.cli.trained_run import Candidate
from peft_jax.core import settings, tree
from peft_jax.data.sources import sample_by_hash
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import HeldOut, hold_out, make_evaluator_of_any
from peft_jax.evaluation.latency import latency
from peft_jax.evaluation.unpacking import as_chosen
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
    workdir.check_own(folder, MEASURED)
    if not command.overwrite and path.exists() and workdir.read_json(path, "asked")["asked"] == asked:
        print(table(workdir.read_json(path, "test", "general", "neighbours", "latency")))
        return 0
    figures = measured(command)
    print(table(figures))
    workdir.write_report(folder, MEASURED, {"asked": asked, **figures})
    return 0


def measured(command) -> dict[str, Any]:
    """``{"test": metrics, "general" and "neighbours": {task: metrics}, "latency": {variant: seconds}}``."""
    config = command.config.copy_and_resolve_references()
    config.eval.update(part="test", limit=config.measure.limit)
    alone = config.measure.of == "base"
    session = load_session(config, None, BASE if alone else trained_on(config))
    candidate = _base(session) if alone else trained_run.load(
        trained_run.folder_of(command), config, session.model, session.base, session.mesh)
    dequantize = session.dequantize(candidate.params)
    evaluate = make_evaluator_of_any(candidate.apply, session.model, session.tokenizer, config, session.mesh,
                                     dequantize)
    metrics = {"test": evaluate(candidate.params, session.held_out, config.task)}
    for kind, limit in (("general", config.measure.general_limit), ("neighbours", config.measure.neighbour_limit)):
        tasks = {name: command.tasks[name] for name in config.measure[kind]}
        metrics[kind] = {name: evaluate(candidate.params, _held_out(session, task, limit), task)
                         for name, task in tasks.items()}  # by the given name: all files are the task "file"
    return {**metrics, "latency": _latency(session, candidate, dequantize) if hasattr(session.model, "init_cache")
            else {}}


def _base(session: Session) -> Candidate:
    return Candidate("base", session.bound(), session.base, None)


def _held_out(session: Session, task, limit: int) -> HeldOut:
    """The held-out examples of another task, whichever half."""
    config = session.config
    examples = sample_by_hash(data_set(task).validation, limit)
    if task.answer != config.task.answer:
        raise PeftJaxError(f"measure: the task {task.name!r} is answered otherwise (task.answer={task.answer}) than "
                           f"{config.task.name!r} ({config.task.answer}): leave it out of config.measure")
    held_out = hold_out(examples, [], session.tokenizer, task, config.data)
    check_fits(held_out.encoded, session.model.config)
    return held_out


def _latency(session: Session, candidate: Candidate, dequantize: str) -> dict[str, dict[str, float]]:
    """Of the plain base, of what was trained as it is when it writes, and of it merged into plain weights, in turn."""
    base, plain, sizes = session.base, session.bound(), session.config.measure
    if any(quant.is_leaf(leaf) for leaf in tree.flatten(base).values()):
        base = load_model(session.config, BASE, session.mesh)[1]
    variants = {"base": (plain, base)}
    if candidate.params is not session.base:
        variants["unmerged"] = (candidate.apply, as_chosen(dequantize, session.model, candidate.params, session.mesh))
        if candidate.merge:
            variants["merged"] = (plain, candidate.merged())
    return latency(variants, session.model, prompt_tokens=sizes.prompt_tokens, new_tokens=sizes.new_tokens,
                   rows=sizes.rows, repeats=sizes.repeats)


def table(measurement: dict[str, Any]) -> str:
    """What was measured, for people."""
    columns = {"test": measurement["test"], **measurement["neighbours"], **measurement["general"]}
    lines = [console.metrics_table(columns), ""]
    lines += [f"{name + ':':<10} {1e3 * one['prefill']:8.1f} ms until the first token, {1e3 * one['token']:7.2f} ms "
              "for each after it" for name, one in measurement["latency"].items()]
    return "\n".join(lines)
