"""What ``run.py`` can be asked to do: train, eval, measure, merge (export), generate, plan, recommend.

Each prints for people and returns an exit code.
"""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from peft_jax.binding.linen import bind
from peft_jax.cli import console, measure, plan, recommend, session, trained_run, workdir
from peft_jax.cli.session import Session
from peft_jax.cli.train import train
from peft_jax.core import tree
from peft_jax.data import encode_prompts
from peft_jax.data.sources import is_chat
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import complete, make_evaluator
from peft_jax.evaluation.generation import Sampling
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub.save import save_pretrained
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.method import BASE
from peft_jax.methods.quantize import requantize
from peft_jax.parallel.mesh import make_mesh


def evaluate(command) -> int:
    """The base model and what the workdir's run trained side by side; also written to ``eval.json``."""
    folder = trained_run.folder_of(command)
    ready = session.load(command.config, command.probe, session.trained_on(command.config))
    made = trained_run.load(folder, command.config, ready.model, ready.base, ready.mesh)
    found = {}
    base = bind(BASE, ready.model, ready.mesh)
    for name, apply, params in (("base", base, ready.base), (made.name, made.apply, made.params)):
        run = make_evaluator(apply, ready.model, ready.tokenizer, ready.held, command.config, ready.mesh)
        found[name] = run(params)
    workdir.write_json(folder / "eval.json", found)
    print(console.metrics_table(found))
    return 0


def merge(command) -> int:
    """Fold the workdir's adapter into the weights: a folder that transformers loads."""
    folder, source = trained_run.folder_of(command), command.config.model.source
    output = Path(command.output).expanduser() if command.output else folder / "merged"
    workdir.check_output(output, folder, source)
    changes, ready, mesh = session.trained_on(command.config), None, make_mesh(**command.config.mesh)
    if command.requantize:
        ready = session.load(command.config, command.probe, changes)
        tokenizer, model, base = ready.tokenizer, ready.model, ready.base
        session.check_codes(base)
    else:
        tokenizer, (model, base) = load_tokenizer(source), session.load_model(command.config, changes, mesh)
    made = trained_run.load(folder, command.config, model, base, mesh)
    if made.merge is None:
        raise PeftJaxError(f"{folder / 'adapter'} is of a method that cannot be folded into weights: use it as it is")
    merged = made.merged()
    if ready:
        merged = _requantized(command.config, ready, merged)
    save_pretrained(output, model, merged, tokenizer)
    print(f"merged model: {output} ({console.size(workdir.bytes_in(output))})")
    return 0


def _requantized(config, ready: Session, merged: tree.Tree) -> tree.Tree:
    """``merged`` in the base's codes again; prints what that costs, leaf by leaf and in the metrics of the task."""
    again, errors = requantize(merged, ready.base)
    print("relative error that quantising adds again:")
    for path, error in sorted(errors.items(), key=lambda item: -item[1]):
        print(f"  {error:.4f}  {path}")
    run = make_evaluator(bind(BASE, ready.model, ready.mesh), ready.model, ready.tokenizer, ready.held, config,
                         ready.mesh)
    print(console.metrics_table({"merged": run(merged), "quantised": run(again)}), flush=True)
    return again


def generate(command) -> int:
    """Continue prompts with the base model and with what the workdir's run trained, or with the named adapters."""
    config = command.config
    if not objective_of(config.task).writes:
        raise PeftJaxError(f"the task {config.task.name!r} is answered by a head, which writes no text: see "
                           "--mode=eval for what it tells")
    if not command.adapters:
        trained_run.folder_of(command)  # an error before anything is loaded
    if command.prompts:
        tokenizer = load_tokenizer(config.model.source)
        mesh = make_mesh(**config.mesh)
        model, base = session.load_model(config, session.trained_on(config), mesh)
        examples = [_as_asked(prompt, config.task) for prompt in command.prompts]
    else:
        ready = session.load(config, method=session.trained_on(config))
        tokenizer, model, base, mesh = ready.tokenizer, ready.model, ready.base, ready.mesh
        examples = [_opening(example) for example in ready.held.examples[: config.generate.num_prompts]]
    prompts = encode_prompts(examples, tokenizer)
    options = {"batch_size": len(prompts), "width_multiple": config.data.width_multiple, "mesh": mesh}
    options |= {"max_new_tokens": config.generate.max_new_tokens, "rng": jax.random.key(config.seed)}
    options |= {"sampling": Sampling(*(config.generate[key] for key in Sampling._fields))}
    answers = {"base": complete(bind(BASE, model, mesh), model, base, prompts, tokenizer, **options)}
    for name, made in _candidates(command, model, base, mesh).items():
        answers[name] = complete(made.apply, model, made.params, prompts, tokenizer, **options)
    for prompt, texts in zip(prompts, zip(*answers.values(), strict=True), strict=True):
        print(console.answers(tokenizer.decode(prompt), dict(zip(answers, texts, strict=True))))
    return 0


def _candidates(command, model, base: tree.Tree, mesh: Mesh) -> dict[str, trained_run.Tuned]:
    """What to try beside the base, by the name to show: the adapters of the command line or what the run trained."""
    if not command.adapters:
        made = trained_run.load(trained_run.folder_of(command), command.config, model, base, mesh)
        return {made.name: made}
    short = [Path(source).parent.name if Path(source).name == "adapter" else Path(source).name
             for source in command.adapters]
    unlike = len(set(short)) == len(short) and "base" not in short
    return {name: trained_run.adapter(source, model, base, mesh) for name, source in
            zip(short if unlike else command.adapters, command.adapters, strict=True)}


def _as_asked(prompt: str, task) -> dict[str, Any]:
    """A prompt of the command line in the form that the task trains on: as it is, or as the user's turn of a chat."""
    if is_chat(task):
        return {"messages": [{"role": "user", "content": prompt}]}
    return {"prompt": prompt}


def _opening(example: dict[str, Any], words: int = 8) -> dict[str, Any]:
    """What to continue: a question as it is; of plain text its first words."""
    return {"prompt": " ".join(example["text"].split(" ")[:words])} if "text" in example else example


JOBS = {"train": train, "eval": evaluate, "merge": merge, "export": merge, "generate": generate, "plan": plan.job,
        "measure": measure.job, "recommend": recommend.job}
