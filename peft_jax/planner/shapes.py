"""One training step as shapes alone: a model from its config, parameters, the optimiser's state, a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peft_jax.binding.linen import bind
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub import families
from peft_jax.hub.load import floating
from peft_jax.method import Method
from peft_jax.models.attention import LACKS, AttentionCore, check_device, choice
from peft_jax.parallel import partitioning
from peft_jax.parallel.mesh import ROWS, row_shards, several
from peft_jax.planner.target_device import Target
from peft_jax.train.loss import states_of

STEPS = 1000  # of the schedule, where only epochs are set: a constant of the program, no memory


class Shapes(NamedTuple):
    """What a step is given. On a ``mesh`` of several devices the leaves know where they lie.

    apply: of :func:`peft_jax.bind`, on the mesh. alone: the same for one device. plain: what trains and what is frozen,
    whole and nowhere. batch: a dict of (accumulate_steps, rows, ...). optimizer: as the method wants it.
    parameters: how many the base has. gpu: whether it is for one.
    """

    model: Any
    method: Method
    parameters: int
    apply: Callable
    alone: Callable
    plain: tuple[tree.Tree, tree.Tree]
    trainable: tree.Tree
    frozen: tree.Tree
    optimizer: optax.GradientTransformation
    opt_state: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    mesh: Mesh | None
    gpu: bool


def as_model(model: Any, dtype: Any = None, param_dtype: Any = None, remat: bool | None = None) -> Any:
    """The model of a config, such as a ``LlamaConfig``, or the model given; what is not ``None`` is set in it.

    Raises ``PeftJaxError`` for what is neither, for a model without the methods ``hidden`` and ``head`` or without a
    field that is to be set, and for a type of no floating-point numbers.

    >>> from peft_jax.models import CausalLM, LlamaConfig
    >>> sizes = LlamaConfig(99, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, True)
    >>> as_model(sizes, remat=True) == CausalLM(sizes, remat=True)
    True
    """
    given = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    given = {name: value if name == "remat" else floating(value) for name, value in given.items() if value is not None}
    if not isinstance(given.get("remat", False), bool):
        raise PeftJaxError(f"plan: remat={remat!r}: give True or False.")
    if hasattr(model, "apply") and not isinstance(model, type):
        _check_model(model, given)
        return model.clone(**given) if given else model
    if not hasattr(model, "model_type") or isinstance(model, type):
        raise PeftJaxError(f"plan: {model!r:.60} is neither a model nor a model's config: give "
                           "peft_jax.load_config(\"owner/name\"), a folder's, or a config class such as LlamaConfig.")
    return families.of(model).model(model, **given)


def _check_model(model, given) -> None:
    kind = type(model)
    if lacks := [name for name in ("hidden", "head") if not hasattr(kind, name)]:
        raise PeftJaxError(f"plan: a {kind.__name__} has no method '{lacks[0]}': training calls hidden(input_ids, "
                           "positions=, lengths= or segment_ids=), then head(hidden) in chunks, so give the model "
                           "both.")
    if lacks := [name for name in given if name not in kind.__dataclass_fields__]:
        raise PeftJaxError(f"plan: a {kind.__name__} has no field '{lacks[0]}' to set: leave {lacks[0]} out.")


def shapes(model: Any, method: Method, optimizer: optax.GradientTransformation, batch: int, seq: int, *,
           mesh: Mesh | None = None, answers: int | None = None, accumulate_steps: int = 1, kind: Any = jnp.int32,
           base: Mapping[str, Any] | None = None, target: Target | None = None, packed: bool = False) -> Shapes:
    """The shapes of one step, arguments as of :func:`peft_jax.plan`; ``kind`` is the type of an answer.

    Raises ``PeftJaxError`` as ``peft_jax.plan`` does.
    """
    answers = _answers(model, seq) if answers is None else answers
    check_attention(getattr(model, "config", None), getattr(model, "dtype", None), target)
    _check(model, mesh, packed, batch=batch, seq=seq, answers=answers, accumulate_steps=accumulate_steps)
    if method.prepare:
        raise PeftJaxError("this method's sizes depend on data that it looks at before training, of which a plan has "
                           "none: plan it with another initialisation, such as init_lora_weights=True.")
    base = abstract(model) if base is None else base
    plain = jax.eval_shape(method.init, jax.random.key(0), base)
    mesh = several(mesh)
    found = batch_shapes(batch, seq, answers, accumulate_steps, kind, mesh, packed)
    params = partitioning.shapes(plain, partitioning.shardings(method, model, plain, mesh)) if mesh else plain
    jax.eval_shape(bind(method, model, mesh), {"params": params}, jnp.zeros((1, 8), jnp.int32))  # leaves nothing reads
    model = attending(model, method, plain, found, target)
    labels = method.labels(params)
    trainable, frozen = tree.partition(params, labels)
    optimizer = method.optimizer(optimizer, STEPS)
    state = _state(optimizer, trainable, mesh)
    return Shapes(model, method, tree.count(base), bind(method, model, mesh), bind(method, model),
                  tree.partition(plain, labels), trainable, frozen, optimizer, state, found, mesh,
                  _device(mesh, target).platform == "gpu")


def _device(mesh: Mesh | None, target: Target | None) -> Any:
    """The first that the step is for."""
    return (target and target.device) or (mesh.devices.flat if mesh else jax.devices())[0]


def _answers(model, seq: int) -> int:
    """Of a row: one of a classifier of texts; else all tokens but the first, which nothing foretells."""
    head = getattr(getattr(model, "config", None), "head", None)
    return 1 if getattr(head, "task_type", None) == "SEQ_CLS" else max(1, seq - 1)


def check_attention(config: Any, dtype: Any, target: Target | None = None) -> None:
    """Raise ``PeftJaxError`` where ``config`` asks for a program that the target, or this machine, does not have."""
    if getattr(config, "attn_implementation", None) in LACKS:
        check_device(config, dtype, target and target.device)


def _state(optimizer, trainable, mesh) -> Any:
    state = jax.eval_shape(optimizer.init, trainable)
    return jax.tree.map(partitioning.shape_at, state, partitioning.like(state, trainable, mesh)) if mesh else state


def abstract(model: Any) -> tree.Tree:
    """The shapes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def batch_shapes(rows: int, seq: int, answers: int, accumulate_steps: int = 1, kind: Any = jnp.int32,
                 mesh: Mesh | None = None, packed: bool = False) -> dict[str, Any]:
    """The shapes of a step's batch as :mod:`peft_jax.data.batches` has it, the axis of micro-batches in front."""
    where = NamedSharding(mesh, PartitionSpec(None, ROWS)) if mesh else None

    def of(*width, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((accumulate_steps, rows, *width), dtype, sharding=where)

    return {"input_ids": of(seq), **({"segment_ids": of(seq)} if packed else {"lengths": of()}), "positions": of(seq),
            "loss_index": of(answers), "loss_target": of(answers, dtype=kind),
            "loss_weight": of(answers, dtype=jnp.float32)}


def attending(model: Any, method: Method, params: tree.Tree, batch: Mapping[str, Any],
              target: Target | None) -> Any:
    """``model`` with the attention that ``target`` would choose where it is left to the device: it is not there to be
    asked. What decides are the keys that the method makes of them, a prefix included."""
    device = target and target.device
    if device is None or getattr(model.config, "attn_implementation", None) != "auto":
        return model
    choices = set()

    def watch(next_fun, context, *args, **kwargs):
        if isinstance(context.module, AttentionCore):
            query, key, _, mask = args
            choices.add(choice(query, key, mask, device))
        return next_fun(*args, **kwargs)

    def intercept(next_fun, args, kwargs, context):
        return method.intercept(partial(watch, next_fun, context), args, kwargs, context)

    plain = model.clone(config=dataclasses.replace(model.config, attn_implementation="xla"))
    apply = bind(method._replace(intercept=intercept), plain)
    jax.eval_shape(lambda params, batch: states_of(apply, params, jax.tree.map(lambda one: one[0], batch)),
                   params, dict(batch))
    chosen = choices.pop() if len(choices) == 1 else "xla"
    return model.clone(config=dataclasses.replace(model.config, attn_implementation=chosen))


def check_types(method: Any, optimizer: Any, mesh: Any, target: Any = None) -> None:
    """Raise ``PeftJaxError`` where one is something else, such as its name."""
    for name, value, kind, instead in (
            ("method", method, Method, "lora() or chain(quantize(), lora())"),
            ("optimizer", optimizer, optax.GradientTransformation, "optax.adamw(1e-4)"),
            ("mesh", mesh, Mesh | None, "peft_jax.make_mesh(fsdp=-1)"),
            ("target", target, Target | None, "peft_jax.planner.h100()")):
        if not isinstance(value, kind):
            raise PeftJaxError(f"plan: {name} is a {type(value).__name__}: give one such as {instead}. The order is "
                               "plan(method, model, optimizer, batch, seq, mesh).")


def check_sizes(what: str = "plan", /, **sizes: int) -> None:
    """Raise ``PeftJaxError`` where one is no whole number of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PeftJaxError(f"{what}: {name}={value!r}: give a whole number of at least 1.")


def _check(model, mesh, packed, **sizes: int) -> None:
    check_sizes(**sizes)
    most = getattr(getattr(model, "config", None), "max_position_embeddings", sizes["seq"])
    if sizes["seq"] > most and not packed:
        raise PeftJaxError(f"plan: seq={sizes['seq']}, but the model has {most} positions: give at most as many "
                           "(--config.data.row_length or --config.data.max_length).")
    if sizes["answers"] > sizes["seq"]:
        raise PeftJaxError(f"plan: answers={sizes['answers']} of a row of {sizes['seq']} tokens: give at most as many.")
    if sizes["batch"] % row_shards(mesh):
        raise PeftJaxError(f"plan: {sizes['batch']} rows cannot be shared by {row_shards(mesh)} parts of the mesh "
                           "(data x fsdp): give a multiple.")
