"""From a configuration to what a job needs: data, tokenizer, model, method. Cheap things first: quick errors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax import quant
from peft_jax.core import tree
from peft_jax.data import load_examples
from peft_jax.data.batches import One
from peft_jax.data.sources import Example, half_by_hash, sample_by_hash
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.evaluation.evaluate import HeldOut, hold_out
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import families
from peft_jax.hub.formats import bitsandbytes as bnb
from peft_jax.hub.load import load_config, load_pretrained, with_head
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.method import BASE, Method, chain
from peft_jax.methods import METHODS
from peft_jax.models.attention import check_device, on_heads
from peft_jax.parallel.mesh import make_mesh, several


class Session(NamedTuple):
    """train: training examples. held: held-out ones. model, base: the pretrained model and its parameters,
    which lie on the mesh."""

    train: list[Example]
    held: HeldOut
    tokenizer: Any
    model: Any
    base: tree.Tree
    mesh: Mesh


def load(config, probe_task=None, method: Method = BASE) -> Session:
    """Data, tokenizer and model of a configuration; ``probe_task`` is the task behind ``eval.probe`` or ``None``.

    ``method`` as of :func:`load_model`. Raises ``PeftJaxError`` where something of it is not to be had or does not fit.
    """
    mesh = make_mesh(**config.mesh)
    examples = load_examples(config.task)
    if not examples["validation"]:
        raise PeftJaxError(
            f"task {config.task.name!r} holds nothing out to evaluate on; set --config.task.validation_fraction"
        )
    part = half_by_hash(examples["validation"], config.eval.part)
    if not part:
        raise PeftJaxError(f"of the {len(examples['validation'])} held-out examples none is in the half "
                           f"{config.eval.part!r}: set --config.eval.part=all, or hold more out")
    held_out = sample_by_hash(part, config.eval.limit)
    probe = load_probe(config, probe_task)
    tokenizer = load_tokenizer(config.model.source)
    held = hold_out(held_out, probe, tokenizer, config.task, config.data)
    model_config = load_config(config.model.source)
    check_answers(config.task, model_config)
    check_fits([*held.encoded, *held.probe], model_config)
    model, base = load_model(config, method, mesh)
    return Session(examples["train"], held, tokenizer, model, base, mesh)


def load_probe(config, probe_task) -> list[Example]:
    """The first ``eval.probe_limit`` texts of the general-text task, [] without one."""
    if probe_task is None:
        return []
    try:
        return sample_by_hash(load_examples(probe_task)["validation"], config.eval.probe_limit)
    except PeftJaxError as error:
        raise PeftJaxError(f"general text: {error} (--config.eval.probe= evaluates without it)") from error


def check_answers(task, model_config) -> None:
    """Raise ``PeftJaxError`` where the model cannot answer as the task asks."""
    with_head(model_config, objective_of(task).head(task))
    if objective_of(task).writes and families.of(model_config).heads:
        raise PeftJaxError(f"a {model_config.model_type} model reads and does not write, and the task {task.name!r} is "
                           "answered in words: take task=movie_classes or movie_score, or a language model")


def check_fits(encoded: Sequence[One], model_config, method: Method | None = None) -> None:
    """Raise ``PeftJaxError`` where token ids or lengths, the method's virtual tokens included, are beyond the model's
    vocabulary or positions."""
    highest = max(int(one.input_ids.max()) for one in encoded)
    if highest >= model_config.vocab_size:
        raise PeftJaxError(f"the tokenizer gives the id {highest}, but the model's vocabulary ends at "
                           f"{model_config.vocab_size - 1}: take both from one model.source")
    longest, most = max(len(one.input_ids) for one in encoded), model_config.max_position_embeddings
    parts = [part.config for part in (method.parts or (method,))] if method else []
    n = sum(part.get("num_virtual_tokens", 0) for part in parts if part.get("shift_positions", True))
    if longest + n > most:
        virtual = f" and the method puts {n} in front" if n else ""
        raise PeftJaxError(f"an example has {longest} tokens{virtual}, but the model has {most} positions: lower "
                           "--config.data.max_length, and see --config.data.on_too_long")


def load_model(config, method: Method = BASE, mesh: Mesh | None = None) -> tuple[Any, tree.Tree]:
    """The model computing in ``model.dtype`` and its parameters, kept in ``model.param_dtype``.

    Where the task needs a head, the model has it, and where the checkpoint does not, it starts at random by the seed.
    Where the ``method`` begins with a change of types (a quantised base), that happens while the weights are read. They
    lie on the ``mesh`` where that is of several devices.
    """
    model, params = load_pretrained(config.model.source, dtype=jnp.dtype(config.model.param_dtype),
                                    remat=config.model.remat, head=objective_of(config.task).head(config.task),
                                    rng=jax.random.key(config.seed), method=method,
                                    mesh=several(mesh))
    chosen = on_heads(config.model.attn_implementation, model.config, mesh.shape["tensor"] if mesh else 1)
    sizes = replace(model.config, attn_implementation=chosen)
    check_device(sizes, jnp.dtype(config.model.dtype))
    return model.clone(config=sizes, dtype=jnp.dtype(config.model.dtype)), params


def trained_on(config) -> Method:
    """What an adapter of this configuration's method stands on: its changes of types alone."""
    method = build_method(config)
    changes = [one for part in method.parts or (method,) if (one := part.base_quantization or part).convert]
    return chain(*changes) if changes else BASE


def check_codes(base: tree.Tree) -> None:
    """Raise ``PeftJaxError`` where what is quantised in the base could not be saved so, before any work is done."""
    packed = {path: leaf for path, leaf in tree.flatten(base).items() if quant.is_leaf(leaf)}
    if not packed:
        raise PeftJaxError("--requantize: the base of this run is not quantised: leave it out")
    try:
        bnb.described(packed, ())
    except PeftJaxError as error:
        raise PeftJaxError(f"--requantize: {error} Or leave --requantize out.") from error


def build_method(config) -> Method:
    """The method of ``config.method``, called with all its other keys; for the name "chain" these are methods.

    Methods know no tokenizer: of a key ``..._text`` that is set they get the ids, as ``..._ids``, that the model's
    tokenizer gives for it, special tokens included, as in peft.
    """
    return _built(config.method.to_dict(), partial(_token_ids, config.model.source))


def _built(arguments: dict[str, Any], encode: Callable[[str], tuple[int, ...]]) -> Method:
    name = arguments.pop("name")
    if name == "chain":
        return chain(*[_built(arguments[part], encode) for part in arguments["order"]])
    if name not in METHODS:
        raise PeftJaxError(f"--config.method.name={name}: {nearest(name, METHODS)}")
    for key in [key for key in arguments if key.endswith("_text")]:
        if text := arguments.pop(key):
            ids = f"{key.removesuffix('_text')}_ids"
            if arguments[ids] is not None:
                raise PeftJaxError(f"{name} has both {key} and {ids}: give the text or its token ids, not both.")
            arguments[ids] = encode(text)
    return METHODS[name](**arguments)


def _token_ids(source: str, text: str) -> tuple[int, ...]:
    return tuple(load_tokenizer(source)(text)["input_ids"])
