"""What a training step needs of memory, from the model's config alone: the real step, compiled for shapes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from peft_jax import sharding, tree
from peft_jax.data.collate import round_up
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.objectives import objective_of
from peft_jax.hub import config as hub_config
from peft_jax.hub import families, load_config
from peft_jax.hub.pretrained import quantised_as, with_head
from peft_jax.loss import cross_entropy, squared_error
from peft_jax.mesh import describe_mesh, make_mesh, row_shards, several
from peft_jax.method import Method
from peft_jax.models.attention import on_heads
from peft_jax.planner import Plan, Target, compile_step, describe, h100, sum_of_parts
from peft_jax.planner.rule import rules
from peft_jax.planner.shapes import STEPS, Shapes, as_model, check_attention, check_sizes, shapes
from peft_jax.train import session, workdir
from peft_jax.train.optim import make_optimizer
from peft_jax.train.step import init_state, make_step, state_shardings

LENGTH = 1024  # tokens of a row, where neither rows nor examples have a limit


def plan(model: Any, method: Method, optimizer: optax.GradientTransformation, batch: int = 1, seq: int = LENGTH,
         mesh: Mesh | None = None, remat: bool | None = None, *, dtype: Any = None, param_dtype: Any = None,
         answers: int | None = None, accumulate_steps: int = 1, loss_chunk: int = 512, error: Callable = cross_entropy,
         base: Mapping[str, Any] | None = None, target: Target | None = None,
         assumed: Mapping[str, Any] | None = None, packed: bool = False) -> Plan:
    """What one training step needs of one device, before there are weights: nothing is allocated or downloaded.

    The step is that of training, lowered and compiled; beside it stand a sum of parts and the article's rule of thumb.

    Args:
      model: a config, such as ``peft_jax.load_config(source)`` or a ``LlamaConfig``; or a model, with methods
        ``hidden`` and ``head``, such as ``CausalLM(config, dtype, param_dtype, remat)``.
      optimizer: over the trained leaves, such as ``optax.adamw(1e-4)``.
      batch, seq: rows of a micro-batch, of all devices together, and tokens of a row.
      mesh: of :func:`peft_jax.make_mesh`; of several devices, weights are cut as ``model.sharding`` says, and all
        bytes are each device's.
      remat, dtype, param_dtype: set in the model where they are given; else its own, of a config the class's defaults.
      answers: tokens of a row that are learnt; by default all but the first, of a classifier of texts one.
      accumulate_steps: micro-batches of a step. loss_chunk, error: as of training.
      base: the model's parameters or their shapes; by default what ``model.init`` gives, in the model's
        ``param_dtype``.
      target: what to compile for, such as ``peft_jax.planner.h100()``; by default a device of the default backend.
      packed: rows hold several texts, positions from 0 in each: they may be longer than the model's positions.
      assumed: words on where the shapes come from, to be shown with the plan.

    Returns a :class:`peft_jax.planner.Plan`; ``peft_jax.planner.describe(plan)`` is its table, ``plan.groups`` the
    bytes of weights, gradients, optimiser, activations, logits and batch, ``plan.sum`` their total,
    ``plan.program.memory.total`` the compiled one. Compiled for a CPU its temporaries are an estimate of a GPU's.

    Raises ``PeftJaxError`` for sizes below 1, rows longer than the model's positions, a target together with a mesh,
    a method that needs data, cuDNN's attention where it cannot be had, and what is no model, method or optimiser.

    >>> from peft_jax import lora
    >>> from peft_jax.models.llama import LlamaConfig
    >>> sizes = LlamaConfig(99, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, True)
    >>> found = plan(sizes, lora(r=4), optax.adamw(1e-4), batch=2, seq=16)
    >>> {name: found.groups[name] for name in ("weights", "gradients", "optimiser", "batch")}
    {'weights': 78352, 'gradients': 3584, 'optimiser': 7172, 'batch': 756}
    """
    if target is not None and several(mesh):
        raise PeftJaxError("plan: a target is one device: leave target out, or the mesh.")
    check_sizes(loss_chunk=loss_chunk)
    model = as_model(model, dtype, param_dtype, remat)
    given = shapes(model, method, optimizer, batch, seq, mesh=mesh, answers=answers, accumulate_steps=accumulate_steps,
                   kind=jnp.float32 if error is squared_error else jnp.int32, base=base, target=target,
                   packed=packed)
    state, where = _state(given)
    step = make_step(given.apply, given.optimizer, loss_chunk, error, method.penalty, given.mesh, where)
    words = {**_words(given.model, given.batch), **({"mesh": describe_mesh(given.mesh)} if given.mesh else {}),
             **(assumed or {})}
    program = compile_step(step, state, given.frozen, given.batch, target, given.mesh.size if given.mesh else 1)
    return Plan(words, program, sum_of_parts(given, loss_chunk, error), rules(given))


def _state(given: Shapes):
    """(shapes of the state, its shardings on a mesh)."""
    state = jax.eval_shape(lambda leaves, rng: init_state(leaves, given.optimizer, rng), given.trainable,
                           jax.random.key(0))
    if not given.mesh:
        return state, None
    where = state_shardings(given.trainable, given.optimizer, given.mesh)
    return jax.tree.map(sharding.shape_at, state, where), where


def _words(model, batch) -> dict[str, Any]:
    several, rows, seq = batch["input_ids"].shape
    return {"micro-batch": f"{rows} x {seq} tokens, {batch['loss_index'].shape[-1]} answers a row",
            "micro-batches a step": several, "computing in": _dtype(model, "dtype"),
            "weights, if plain, in": _dtype(model, "param_dtype"), "remat": getattr(model, "remat", False),
            "attention": getattr(getattr(model, "config", None), "attn_implementation", "the model's own")}


def _dtype(model, field: str) -> str:
    return jnp.dtype(getattr(model, field, jnp.float32)).name


def job(command) -> int:
    """Print the plan of a configuration, and write it to ``plan.json`` in the workdir."""
    config, folder = command.config, Path(command.workdir)
    workdir.check_writable(folder)
    found = plan_config(config, h100() if jax.default_backend() == "cpu" else None)
    print(describe(found))
    workdir.write_report(folder, "plan.json", found.to_dict())
    return 0


def plan_config(config, target: Target | None = None) -> Plan:
    """The plan of a run's configuration, compiled for ``target``.

    What there is for the data to say, the shape of a batch above all, has a default here; see ``assumed``.
    """
    sizes = load_config(config.model.source)
    session.check_answers(config.task, sizes)
    objective = objective_of(config.task)
    mesh = _mesh(config.mesh)
    sizes = with_head(sizes, objective.head(config.task))
    chosen = on_heads(config.model.attn_implementation, sizes, mesh.shape["tensor"])
    sizes = replace(sizes, attn_implementation=chosen)
    kinds = {name: jnp.dtype(config.model[name]) for name in ("dtype", "param_dtype")}
    check_attention(sizes, kinds["dtype"], target)
    model = families.of(sizes).model(sizes, **kinds, remat=config.model.remat)
    base = tree.unflatten({path: jax.ShapeDtypeStruct(shape, kinds["param_dtype"])
                           for path, shape in hub_config.param_shapes(sizes).items()})
    held = quantised_as(config.model.source)
    base = jax.eval_shape(held.init, jax.random.key(0), base) if held else base
    method = session.build_method(config)
    batch, seq, words = batch_sizes(config.data, sizes, row_shards(mesh))
    params = base if method.prepare else jax.eval_shape(method.init, jax.random.key(0), base)
    optimizer = make_optimizer(config.optim, config.optim.steps or STEPS, method.labels(params))
    source = f"{config.model.source}{', quantised as its config.json says, in blocks of 64' if held else ''}"
    kind = " + ".join(part.config["peft_type"] for part in method.parts or (method,))
    assumed = {"model": source, "method": kind, "rows are": words, "optimiser": "AdamW"}
    return plan(model, method, optimizer, batch, seq, mesh, answers=None if objective.writes else 1,
                accumulate_steps=config.optim.accumulate_steps, loss_chunk=config.optim.loss_chunk,
                error=objective.error, base=base, target=None if several(mesh) else target, assumed=assumed,
                packed=config.data.collate == "pack")


def _mesh(sizes) -> Mesh:
    try:
        return make_mesh(**sizes)
    except PeftJaxError as error:
        raise PeftJaxError(f"{error} A plan's devices need not be there: XLA_FLAGS=--xla_force_host_platform_device_"
                           "count=8 in the environment makes 8 of a CPU.") from error


def batch_sizes(data, sizes, multiple: int) -> tuple[int, int, str]:
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
