"""``--mode=generate``: prompts continued by the base model and by what was trained, side by side; of a model with a
head, what it tells of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from peft_jax.binding.linen import bind
from peft_jax.cli import console, trained_run
from peft_jax.cli.build_method import trained_on
from peft_jax.cli.load_model import load_model
from peft_jax.cli.predict import predictor
from peft_jax.cli.session import load_session
from peft_jax.cli.trained_run import Candidate
from peft_jax.core import tree
from peft_jax.data import encode_prompts
from peft_jax.data.chat import check_template, question, wants_chat
from peft_jax.data.sources import Example, is_chat
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import complete
from peft_jax.evaluation.generation import Sampling
from peft_jax.evaluation.objectives import objective_of
from peft_jax.evaluation.unpacking import choose
from peft_jax.hub.chat_template import describe_stops
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.method import BASE
from peft_jax.parallel.mesh import make_mesh


class Asked(NamedTuple):
    """Questions, and the model that is to answer them."""

    examples: list[Example]
    tokenizer: Any
    model: Any
    base: tree.Tree
    mesh: Mesh


def job(command) -> int:
    """Print what the base makes of each prompt, and what the workdir's run or the named adapters do."""
    config = command.config
    if not command.adapters:
        trained_run.folder_of(command)  # an error before anything is loaded
    asked = _asked(command)
    questions, answer = (_writer if objective_of(config.task).writes else _teller)(config, asked)
    answers = {"base": answer(bind(BASE, asked.model, asked.mesh), asked.base, ())}
    answers |= {name: answer(one.apply, one.params, one.classes) for name, one in _candidates(command, asked).items()}
    for asked_for, texts in zip(questions, zip(*answers.values(), strict=True), strict=True):
        print(console.answers(asked_for, dict(zip(answers, texts, strict=True))))
    return 0


def _asked(command) -> Asked:
    """The prompts of the command line, or held-out examples; no data is loaded where there are prompts."""
    config, changes = command.config, trained_on(command.config)
    if not command.prompts:
        session = load_session(config, method=changes)
        examples = session.held_out.examples[: config.generate.num_prompts]
        if objective_of(config.task).writes:
            examples = [_opening(example) for example in examples]
        return Asked(examples, session.tokenizer, session.model, session.base, session.mesh)
    tokenizer, mesh = load_tokenizer(config.model.source), make_mesh(**config.mesh)
    examples = _as_asked(command, tokenizer)
    model, base = load_model(config, changes, mesh)
    return Asked(examples, tokenizer, model, base, mesh)


def _teller(config, asked: Asked) -> tuple[list[str], Callable[..., list[str]]]:
    """(the texts, ``answer(apply, params, classes) -> what a head tells of each``)."""
    texts = [example["text"] for example in asked.examples]
    return texts, predictor(config, texts, asked.tokenizer, asked.mesh)


def _writer(config, asked: Asked) -> tuple[list[str], Callable[..., list[str]]]:
    """(the prompts as the model reads them, ``answer(apply, params, classes) -> how each goes on``)."""
    prompts = encode_prompts(asked.examples, asked.tokenizer)
    sampling = Sampling(**{key: config.generate[key] for key in Sampling._fields})
    choice = choose(config.generate.dequantize, asked.model, asked.base, asked.mesh)
    for line in filter(None, (choice.words, describe_stops(asked.tokenizer))):
        print(line, flush=True)
    options = {"batch_size": len(prompts), "width_multiple": config.data.width_multiple, "mesh": asked.mesh,
               "max_new_tokens": config.generate.max_new_tokens, "rng": jax.random.key(config.seed),
               "sampling": sampling, "dequantize": choice.dequantize}
    return ([asked.tokenizer.decode(prompt) for prompt in prompts],
            lambda apply, params, classes: complete(apply, asked.model, params, prompts, asked.tokenizer, **options))


def _candidates(command, asked: Asked) -> dict[str, Candidate]:
    """What to try beside the base, by the name to show: the adapters of the command line or what the run trained."""
    adapter = partial(trained_run.adapter, model=asked.model, base=asked.base, mesh=asked.mesh)
    if command.adapters:
        return {name: adapter(source) for name, source in
                zip(_names(command.adapters), command.adapters, strict=True)}
    candidate = trained_run.load(trained_run.folder_of(command), command.config, asked.model, asked.base, asked.mesh)
    return {candidate.name: candidate}


def _names(sources: list[str]) -> list[str]:
    """Short names where these tell the adapters apart, else the sources as they were written."""
    short = [Path(source).parent.name if Path(source).name == "adapter" else Path(source).name for source in sources]
    return short if len(set(short)) == len(short) and "base" not in short else sources


def _as_asked(command, tokenizer) -> list[Example]:
    """The prompts of the command line in the form that the task trains on: as they are, or as the user's turn of a
    chat, which they are, too, after a system prompt."""
    config, system = command.config, command.system
    if not objective_of(config.task).writes:
        if system:
            raise PeftJaxError("--system is for models that write: a head reads the text alone")
        return [{"text": prompt} for prompt in command.prompts]
    if not system and not wants_chat(config.task) and not is_chat(config.task):
        return [{"prompt": prompt} for prompt in command.prompts]
    check_template(tokenizer, config.model.source, "--system" if system else "the task, of chats,")
    return [question(prompt, system) for prompt in command.prompts]


def _opening(example: dict[str, Any], words: int = 8) -> dict[str, Any]:
    """What to continue: a question as it is; of plain text its first words."""
    return {"prompt": " ".join(example["text"].split(" ")[:words])} if "text" in example else example
