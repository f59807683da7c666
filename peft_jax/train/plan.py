"""What a training step needs of memory, from the model's config alone: the real step, compiled for shapes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peft_jax import sharding, tree
from peft_jax.data.collate import round_up
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import config as hub_config
from peft_jax.hub import families, load_config
from peft_jax.hub.pretrained import quantised_as, with_head
from peft_jax.loss import cross_entropy, squared_error
from peft_jax.mesh import ROWS, describe_mesh, make_mesh, row_shards, several
from peft_jax.method import Method, bind
from peft_jax.models.attention import on_heads
from peft_jax.planner import Plan, Target, compile_step, describe, h100, sum_of_parts
from peft_jax.train import session, workdir
from peft_jax.train.optim import make_optimizer
from peft_jax.train.step import init_state, make_step, state_shardings

STEPS = 1000  # of the schedule, where only epochs are set: a constant of the program, no memory
LENGTH = 1024  # tokens of a row, where neither rows nor examples have a limit


def plan(model: Any, method: Method, optimizer: optax.GradientTransformation, *, rows: int = 1,
         row_length: int = LENGTH, answers: int | None = None, accumulate_steps: int = 1, loss_chunk: int = 512,
         error: Callable = cross_entropy, base: Mapping[str, Any] | None = None, target: Target | None = None,
         assumed: Mapping[str, Any] | None = None, mesh: Mesh | None = None) -> Plan:
    """What one training step needs of one device, before there are weights: nothing is allocated or downloaded.

    The step is that of training, lowered and compiled; beside it stands a sum of parts.

    Args:
      model: with methods ``hidden`` and ``head``, such as ``CausalLM(config, dtype, param_dtype, remat)``.
      optimizer: over the trained leaves, such as ``optax.adamw(1e-4)``.
      rows, row_length: of a micro-batch. answers: tokens of a row that are learnt; by default all but the first.
      accumulate_steps: micro-batches of a step. loss_chunk, error: as of training.
      base: the model's parameters or their shapes; by default what ``model.init`` gives, in the model's
        ``param_dtype``.
      target: what to compile for, such as ``peft_jax.planner.h100()``; by default a device of the default backend.
      assumed: words on where the shapes come from, to be shown with the plan.
      mesh: of :func:`peft_jax.make_mesh`, of several devices, as ``model.sharding`` says; bytes are then each device's,
        ``rows`` are of all of them, and there is no sum of parts.

    Returns a :class:`peft_jax.planner.Plan`; ``peft_jax.planner.describe(plan)`` is its table. Compiled for a CPU its
    temporaries are an estimate of a GPU's.

    Raises ``PeftJaxError`` for sizes below 1, rows longer than the model's positions, and a method that needs data.

    >>> from peft_jax import lora
    >>> from peft_jax.models.llama import CausalLM, LlamaConfig
    >>> sizes = LlamaConfig(99, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, True)
    >>> found = plan(CausalLM(sizes), lora(r=4), optax.adamw(1e-4), rows=2, row_length=16)
    >>> [(part.name, part.bytes) for part in found.parts][1:4]
    [('trained parameters', 3584), ('optimiser state', 7172), ('batch', 756)]
    """
    answers = row_length - 1 if answers is None else answers
    _check_sizes(model, rows=rows, row_length=row_length, answers=answers, accumulate_steps=accumulate_steps,
                 loss_chunk=loss_chunk)
    if rows % row_shards(mesh):
        raise PeftJaxError(f"plan: {rows} rows cannot be shared by {row_shards(mesh)} parts of the mesh (data x fsdp): "
                           "give a multiple.")
    if method.prepare:
        raise PeftJaxError("this method's sizes depend on data that it looks at before training, of which a plan has "
                           "none: plan it with another initialisation, such as init_lora_weights=True.")
    params = jax.eval_shape(method.init, jax.random.key(0), abstract(model) if base is None else base)
    mesh = several(mesh)
    if mesh:
        params = sharding.shapes(params, sharding.shardings(params, mesh, model.sharding, method))
    apply = bind(method, model, mesh)
    jax.eval_shape(apply, {"params": params}, jnp.zeros((1, 8), jnp.int32))  # an adapter that nothing reads stops here
    trainable, frozen = tree.partition(params, method.labels(params))
    optimizer = method.optimizer(optimizer, STEPS)
    state, where = _state(trainable, optimizer, mesh)
    batch = shapes_of(rows, row_length, answers, accumulate_steps, jnp.float32 if error is squared_error else jnp.int32,
                      mesh)
    step = make_step(apply, optimizer, loss_chunk, error, method.penalty, mesh, where)
    words = {**_words(model, batch), **({"mesh": describe_mesh(mesh)} if mesh else {}), **(assumed or {})}
    parts = [] if mesh else sum_of_parts(apply, trainable, frozen, state.opt_state, (state.step, state.rng), batch,
                                         loss_chunk, error)
    return Plan(words, compile_step(step, state, frozen, batch, target, mesh.size if mesh else 1), parts)


def _state(trainable: tree.Tree, optimizer: optax.GradientTransformation, mesh: Mesh | None):
    """(shapes of the state, its shardings on a mesh)."""
    state = jax.eval_shape(lambda leaves, rng: init_state(leaves, optimizer, rng), trainable, jax.random.key(0))
    if not mesh:
        return state, None
    where = state_shardings(trainable, optimizer, mesh)
    return jax.tree.map(sharding.shape_at, state, where), where


def _words(model, batch) -> dict[str, Any]:
    several, rows, row_length = batch["input_ids"].shape
    return {"micro-batch": f"{rows} x {row_length} tokens, {batch['loss_index'].shape[-1]} answers a row",
            "micro-batches a step": several, "computing in": _dtype(model, "dtype"),
            "weights, if plain, in": _dtype(model, "param_dtype"), "remat": getattr(model, "remat", False)}


def _dtype(model, field: str) -> str:
    return jnp.dtype(getattr(model, field, jnp.float32)).name


def abstract(model: Any) -> tree.Tree:
    """The shapes of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def shapes_of(rows: int, row_length: int, answers: int, accumulate_steps: int, kind: Any = jnp.int32,
              mesh: Mesh | None = None) -> dict[str, Any]:
    """The shapes of a step's batch as :mod:`peft_jax.data.batches` has it, the axis of micro-batches in front."""
    where = NamedSharding(mesh, PartitionSpec(None, ROWS)) if mesh else None

    def of(width, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((accumulate_steps, rows, width), dtype, sharding=where)

    return {"input_ids": of(row_length), "segment_ids": of(row_length), "positions": of(row_length),
            "loss_index": of(answers), "loss_target": of(answers, kind), "loss_weight": of(answers, jnp.float32)}


def _check_sizes(model, **sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PeftJaxError(f"plan: {name}={value!r}: give a whole number of at least 1.")
    most = getattr(getattr(model, "config", None), "max_position_embeddings", sizes["row_length"])
    if sizes["row_length"] > most:
        raise PeftJaxError(f"plan: row_length={sizes['row_length']}, but the model has {most} positions: "
                           "lower --config.data.row_length or --config.data.max_length.")


def job(command) -> int:
    """Print the plan of a configuration, and write it to ``plan.json`` in the workdir."""
    config, folder = command.config, Path(command.workdir)
    workdir.check_writable(folder)
    found = plan_config(config, h100() if jax.default_backend() == "cpu" else None)
    print(describe(found))
    folder.mkdir(parents=True, exist_ok=True)
    workdir.write_json(folder / "plan.json", found.to_dict())
    print(f"\nwritten: {folder / 'plan.json'}")
    return 0


def plan_config(config, target: Target | None = None) -> Plan:
    """The plan of a run's configuration, compiled for ``target``.

    What there is for the data to say, the shape of a batch above all, has a default here; see ``assumed``.
    """
    sizes = load_config(config.model.source)
    session.check_answers(config.task, sizes)
    objective = objective_of(config.task)
    mesh = make_mesh(**config.mesh)
    sizes = with_head(sizes, objective.head(config.task))
    chosen = on_heads(config.model.attn_implementation, sizes, mesh.shape["tensor"])
    sizes = replace(sizes, attn_implementation=chosen)
    kinds = {name: jnp.dtype(config.model[name]) for name in ("dtype", "param_dtype")}
    model = families.of(sizes).model(sizes, **kinds, remat=config.model.remat)
    base = tree.unflatten({path: jax.ShapeDtypeStruct(shape, kinds["param_dtype"])
                           for path, shape in hub_config.param_shapes(sizes).items()})
    held = quantised_as(config.model.source)
    base = jax.eval_shape(held.init, jax.random.key(0), base) if held else base
    method = session.build_method(config)
    rows, row_length, words = _sizes(config.data, sizes, row_shards(mesh))
    params = base if method.prepare else jax.eval_shape(method.init, jax.random.key(0), base)
    optimizer = make_optimizer(config.optim, config.optim.steps or STEPS, method.labels(params))
    source = f"{config.model.source}{', quantised as its config.json says, in blocks of 64' if held else ''}"
    assumed = {"model": source, "method": method.config["peft_type"], "rows are": words,
               "optimiser": "AdamW, two moments in the type of what trains"}
    return plan(model, method, optimizer, rows=rows, row_length=row_length, answers=None if objective.writes else 1,
                accumulate_steps=config.optim.accumulate_steps, loss_chunk=config.optim.loss_chunk,
                error=objective.error, base=base, target=None if mesh.size > 1 else target, assumed=assumed, mesh=mesh)


def _sizes(data, sizes, multiple: int) -> tuple[int, int, str]:
    """(rows, tokens of a row, where they come from) of a micro-batch; without data nobody knows how examples pack."""
    most = sizes.max_position_embeddings
    longest = min(data.max_length or LENGTH, most)  # of an example
    if data.collate != "pack":
        words = "data.batch_size x the longest that an example may be (data.max_length)"
        return int(round_up(data.batch_size, multiple)), longest, words
    named = {"data.rows": data.rows, "data.row_length": data.row_length}
    unset = [f"--config.{name}" for name, value in named.items() if not value]
    words = "as set" if not unset else f"assumed, for want of data; set {' and '.join(unset)}"
    return int(round_up(data.rows or 1, multiple)), data.row_length or longest, words
