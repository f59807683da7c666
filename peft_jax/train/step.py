"""One training step: gradients of the trainable part alone, accumulated, applied, the state donated."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from peft_jax.core import arguments, tree
from peft_jax.parallel import partitioning
from peft_jax.train.loss import batch_loss, cross_entropy


class TrainState(NamedTuple):
    """What a training step changes, and what a checkpoint holds; the frozen base is not in it.

    step: int32 scalar, optimiser steps done. trainable: the leaves that train. opt_state: optax's. rng: a typed key;
    step and micro-batch are folded in, it never changes itself.
    """

    step: jax.Array
    trainable: tree.Tree
    opt_state: Any
    rng: jax.Array


def init_state(trainable: tree.Tree, tx: optax.GradientTransformation, rng: jax.Array,
               where: TrainState | None = None) -> TrainState:
    """The state before the first step.

    It owns its leaves: steps donate them, and some of ``trainable`` may be the base's own.

    Args:
      trainable: nested dicts of the leaves that train, the first tree of :func:`peft_jax.partition`; float32, which the
        optimiser's moments then are too.
      tx: the optimiser, of trees like ``trainable``.
      rng: a typed key, ``jax.random.key(seed)``; dropout is drawn from it.
      where: on a mesh, the shardings of the state, of :func:`state_shardings`.

    >>> state = init_state({"lora_a": jnp.ones((8, 2))}, optax.adam(1e-3), jax.random.key(0))
    >>> int(state.step), state.trainable["lora_a"].shape
    (0, (8, 2))
    """
    arguments.check("init_state", {"trainable": trainable, "tx": tx, "rng": rng})

    def make(trainable, rng):
        trainable = jax.tree.map(jnp.copy, trainable)
        return TrainState(step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=tx.init(trainable), rng=rng)

    return make(trainable, rng) if where is None else jax.jit(make, out_shardings=where)(trainable, rng)


def state_shardings(trainable: tree.Tree, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where the state of ``trainable`` lies on a mesh: a ``TrainState`` of shardings.

    Moments lie where their leaves do, scalars and the key are on every device.

    Args:
      trainable: as of :func:`init_state`, arrays that lie on the mesh, or shapes with shardings on it.
      tx: the optimiser. mesh: of :func:`peft_jax.make_mesh`.

    >>> import peft_jax
    >>> mesh = peft_jax.make_mesh(devices=jax.devices()[:1])
    >>> everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    >>> leaves = jax.device_put({"lora_a": jnp.ones((8, 2))}, everywhere)
    >>> where = state_shardings(leaves, optax.adam(1e-3), mesh)
    >>> state = init_state(leaves, optax.adam(1e-3), jax.random.key(0), where)
    >>> state.opt_state[0].mu["lora_a"].sharding == where.opt_state[0].mu["lora_a"]
    True
    """
    arguments.check("state_shardings", {"trainable": trainable, "tx": tx, "mesh": mesh})
    shapes = jax.eval_shape(lambda leaves, rng: init_state(leaves, tx, rng), trainable, jax.random.key(0))
    return partitioning.like(shapes, trainable, mesh)


def make_step(apply: Callable, tx: optax.GradientTransformation, loss_chunk: int = 512,
              error: Callable = cross_entropy, penalty: Callable[[tree.Tree], jax.Array] | None = None,
              mesh: Mesh | None = None, where: TrainState | None = None) -> Callable:
    """A jitted ``step(state, frozen, batch) -> (state, metrics)``; ``state`` is donated.

    The gradient is that of the mean loss over all answers of all micro-batches, so splitting a batch changes nothing
    but rounding.

    Args:
      apply: ``peft_jax.bind(method, model)``, of a model with the methods ``hidden`` and ``head``.
      tx: the optimiser of ``state``.
      loss_chunk: tokens whose logits exist at once.
      error: ``(logits float32 (n, k), target (n,)) -> (n,)``, the loss of each answer; by default its cross entropy in
        nats.
      penalty: ``(params) -> float32 scalar``, such as ``method.penalty``. Its gradient is added; the ``loss`` that is
        reported is without it.
      mesh: on which state and frozen leaves lie. where: the shardings of the state, which the new one has too.

    Returns:
      ``step``. ``frozen`` is the second tree of :func:`peft_jax.partition`. ``batch`` has the arrays below, with the
      axes (accumulate_steps, rows) in front; int32 but for ``loss_weight``, and ``loss_target`` where it is a score:

      * ``input_ids`` and ``positions``: (..., tokens). ``lengths``: (...), how many of a row's tokens are one text,
        padding behind it; or, of packed rows, ``segment_ids``: (..., tokens), 0 for padding; or neither.
      * ``loss_index``: (..., answers), at which tokens the model is asked. ``loss_target``: the answer there.
        ``loss_weight``: float32, 0 where there is none.

      Metrics are float32 scalars: ``loss``, the mean error of an answer; ``grad_norm``, before clipping;
      ``update_norm``, of what was added to the trainable leaves. Where these are finite, so is the new state if the old
      one was.

    >>> import peft_jax
    >>> from peft_jax.models import CausalLM, LlamaConfig
    >>> model = CausalLM(LlamaConfig(99, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, False))
    >>> method, tx = peft_jax.lora(r=2), optax.adam(0.1)
    >>> base = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    >>> params = method.init(jax.random.key(1), base)
    >>> trainable, frozen = peft_jax.partition(params, method.labels(params))
    >>> ids = jnp.arange(5)[None, None]  # one micro-batch of one row; each token is asked for its next one
    >>> batch = {"input_ids": ids, "lengths": jnp.array([[5]]), "positions": ids, "loss_index": ids[..., :4],
    ...          "loss_target": ids[..., 1:], "loss_weight": jnp.ones((1, 1, 4))}
    >>> step, state = make_step(peft_jax.bind(method, model), tx), init_state(trainable, tx, jax.random.key(2))
    >>> losses = []
    >>> for _ in range(3):
    ...     state, metrics = step(state, frozen, batch)
    ...     losses.append(float(metrics["loss"]))
    >>> int(state.step), losses[2] < losses[0]
    (3, True)
    """
    arguments.check("make_step", {"apply": apply, "tx": tx, "mesh": mesh}, optional=("mesh",))

    def gradient_of(trainable, frozen, micro, rng):
        def loss(leaves):
            return batch_loss(apply, tree.combine(frozen, leaves), micro, chunk=loss_chunk, rngs={"dropout": rng},
                              error=error, mesh=mesh)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    penalty_gradient = (None if penalty is None else
                        jax.grad(lambda leaves, frozen: penalty(tree.combine(frozen, leaves))))

    def step(state, frozen, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        (loss, weight), gradient = _summed(gradient_of, state.trainable, frozen, batch, rng)
        weight = jnp.maximum(weight, 1)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        if penalty_gradient is not None:
            gradient = jax.tree.map(jnp.add, gradient, penalty_gradient(state.trainable, frozen))
        updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
        metrics = {"loss": loss / weight, "grad_norm": optax.tree.norm(gradient),
                   "update_norm": optax.tree.norm(updates)}
        trainable = optax.apply_updates(state.trainable, updates)
        return state._replace(step=state.step + 1, trainable=trainable, opt_state=opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if where is None else (where, None))


def _summed(gradient_of: Callable, trainable: tree.Tree, frozen: tree.Tree, batch: Any, rng: jax.Array) -> Any:
    """((loss, weight), gradient), each the sum over the micro-batches; one after the other is computed."""
    count = batch["input_ids"].shape[0]
    if count == 1:
        only = jax.tree.map(lambda x: x[0], batch)
        return gradient_of(trainable, frozen, only, jax.random.fold_in(rng, 0))

    def add(total, indexed):
        index, micro = indexed
        part = gradient_of(trainable, frozen, micro, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, part), None

    zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zero, (jnp.arange(count), batch))[0]
