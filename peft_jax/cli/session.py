"""From a configuration to what several jobs need: held-out data, tokenizer, model. Cheap things first: quick errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from peft_jax.binding.linen import bind
from peft_jax.cli.checks import check_fits
from peft_jax.cli.load_data import load_data
from peft_jax.cli.load_model import load_model, model_files
from peft_jax.core import tree
from peft_jax.data.chat import check_template, wants_chat
from peft_jax.data.sources import Example
from peft_jax.evaluation.evaluate import HeldOut, hold_out, make_evaluator
from peft_jax.evaluation.unpacking import choose
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.method import BASE, Method
from peft_jax.parallel.mesh import make_mesh


class Session(NamedTuple):
    """train: training examples. unused: columns that these do not hold. held_out: examples to evaluate on, tokenised.
    model, base: the pretrained model and its parameters, which lie on the mesh."""

    config: Any
    train: list[Example]
    unused: tuple[str, ...]
    held_out: HeldOut
    tokenizer: Any
    model: Any
    base: tree.Tree
    mesh: Mesh

    def bound(self, method: Method = BASE) -> Callable:
        """``apply`` of the model with a method, by default of the model as it is."""
        return bind(method, self.model, self.mesh)

    def evaluator(self, apply: Callable, dequantize: str) -> Callable[[tree.Tree], dict[str, float]]:
        """``evaluate(params) -> metrics`` of what is held out, as :func:`make_evaluator` says."""
        return make_evaluator(apply, self.model, self.tokenizer, self.held_out, self.config, self.mesh, dequantize)

    def dequantize(self, params: tree.Tree) -> str:
        """What ``generate.dequantize`` comes to for ``params``; a line says so where evaluation writes."""
        choice = choose(self.config.generate.dequantize, self.model, params, self.mesh)
        if choice.words and self.held_out.prompts:
            print(choice.words, flush=True)
        return choice.dequantize


def load_session(config, probe_task=None, method: Method = BASE) -> Session:
    """Data, tokenizer and model of a configuration; ``probe_task`` is the task behind ``eval.probe`` or ``None``.

    ``method`` as of :func:`load_model`. Raises ``PeftJaxError`` where something of it is not to be had or does not fit.
    """
    mesh = make_mesh(**config.mesh)
    data = load_data(config, probe_task)
    files, tokenizer = model_files(config), load_tokenizer(config.model.source)
    if wants_chat(config.task):
        check_template(tokenizer, config.model.source, "task.chat=True")
    held_out = hold_out(data.held_out, data.probe, tokenizer, config.task, config.data)
    check_fits([*held_out.encoded, *held_out.probe], files.config)
    model, base = load_model(config, method, mesh, files)
    return Session(config=config, train=data.train, unused=data.unused, held_out=held_out, tokenizer=tokenizer,
                   model=model, base=base, mesh=mesh)
