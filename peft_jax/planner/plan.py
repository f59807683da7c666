"""What a training step needs of memory, before there are weights: the real step, compiled for shapes."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.parallel import partitioning
from peft_jax.parallel.mesh import describe_mesh, several
from peft_jax.planner.breakdown import sum_of_parts
from peft_jax.planner.compiled import compile_step
from peft_jax.planner.plan_result import Plan
from peft_jax.planner.rule_of_thumb import rules
from peft_jax.planner.shapes import Shapes, as_model, check_sizes, check_types, shapes
from peft_jax.planner.target_device import Target
from peft_jax.train.loss import cross_entropy, squared_error
from peft_jax.train.step import init_state, make_step, state_shardings

LENGTH = 1024  # tokens of a row, where neither rows nor examples have a limit


def plan(method: Method, model: Any, optimizer: optax.GradientTransformation, batch: int = 1, seq: int = LENGTH,
         mesh: Mesh | None = None, remat: bool | None = None, *, dtype: Any = None, param_dtype: Any = None,
         answers: int | None = None, accumulate_steps: int = 1, loss_chunk: int = 512, error: Callable = cross_entropy,
         base: Mapping[str, Any] | None = None, target: Target | None = None,
         assumed: Mapping[str, Any] | None = None, packed: bool = False) -> Plan:
    """What one training step needs of one device, before there are weights: nothing is allocated or downloaded.

    The step is that of training, lowered and compiled; beside it stand a sum of parts and the
    rule of thumb of the article "Full Fine-Tuning vs PEFT".

    Args:
      method: what trains, such as ``peft_jax.lora(r=8)``.
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
      packed: rows hold several texts, positions from 0 in each: they may be longer than the model's positions, and have
        ``segment_ids`` instead of ``lengths``.
      assumed: words on where the shapes come from, to be shown with the plan.

    Returns a :class:`peft_jax.planner.Plan`; ``peft_jax.planner.describe(plan)`` is its table, ``plan.groups`` the
    bytes of weights, gradients, optimiser, activations, logits and batch, ``plan.sum`` their total,
    ``plan.program.memory.total`` the compiled one. Compiled for a CPU its temporaries are an estimate of a GPU's.

    Raises ``PeftJaxError`` for sizes below 1, rows longer than the model's positions, a target together with a mesh,
    a method that needs data, cuDNN's attention where it cannot be had, and what is no model, method or optimiser.

    >>> from peft_jax import lora
    >>> from peft_jax.models.llama import LlamaConfig
    >>> sizes = LlamaConfig(99, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, True)
    >>> found = plan(lora(r=4), sizes, optax.adamw(1e-4), batch=2, seq=16)
    >>> {name: found.groups[name] for name in ("weights", "gradients", "optimiser", "batch")}
    {'weights': 78352, 'gradients': 3584, 'optimiser': 7172, 'batch': 636}
    """
    check_types(method, optimizer, mesh, target)
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
    return jax.tree.map(partitioning.shape_at, state, where), where


def _words(model, batch) -> dict[str, Any]:
    several, rows, seq = batch["input_ids"].shape
    return {"micro-batch": f"{rows} x {seq} tokens, {batch['loss_index'].shape[-1]} answers a row",
            "micro-batches a step": several, "computing in": _dtype(model, "dtype"),
            "weights, if plain, in": _dtype(model, "param_dtype"), "remat": getattr(model, "remat", False),
            "attention": getattr(getattr(model, "config", None), "attn_implementation", "the model's own")}


def _dtype(model, field: str) -> str:
    return jnp.dtype(getattr(model, field, jnp.float32)).name
