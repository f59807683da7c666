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
    """What a training step changes, and what a checkpoint holds; the frozen base is not in it."""

    step: jax.Array  # int32 scalar, optimiser steps done
    trainable: tree.Tree
    opt_state: Any
    rng: jax.Array  # typed key; step and micro-batch are folded in, it never changes itself


def init_state(trainable: tree.Tree, tx: optax.GradientTransformation, rng: jax.Array,
               where: TrainState | None = None) -> TrainState:
    """The state before the first step. It owns its leaves: steps donate them, and the base's may be among the given.

    On a mesh, ``where`` are its shardings, of :func:`state_shardings`.
    """
    arguments.check("init_state", {"trainable": trainable, "tx": tx, "rng": rng})

    def make(trainable, rng):
        trainable = jax.tree.map(jnp.copy, trainable)
        return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), rng)

    return make(trainable, rng) if where is None else jax.jit(make, out_shardings=where)(trainable, rng)


def state_shardings(trainable: tree.Tree, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Where the state of ``trainable``, arrays on the mesh or shapes with their shardings, lies on it."""
    arguments.check("state_shardings", {"trainable": trainable, "tx": tx, "mesh": mesh})
    shapes = jax.eval_shape(lambda leaves, rng: init_state(leaves, tx, rng), trainable, jax.random.key(0))
    return partitioning.like(shapes, trainable, mesh)


def make_step(apply: Callable, tx: optax.GradientTransformation, loss_chunk: int,
              error: Callable = cross_entropy, penalty: Callable[[tree.Tree], jax.Array] | None = None,
              mesh: Mesh | None = None, where: TrainState | None = None) -> Callable:
    """A jitted ``step(state, frozen, batch) -> (state, metrics)``; ``state`` is donated.

    Leaves of ``batch`` are (accumulate_steps, batch, ...). The gradient is that of the mean loss over all answers
    of all micro-batches, so splitting a batch changes nothing but rounding; ``penalty(params)`` is added to that mean
    for the gradient, and is not in the ``loss`` that is reported. Metrics are float32 scalars: ``loss``, the mean
    ``error`` of an answer, which is in nats per token by default, ``grad_norm`` before clipping, ``update_norm`` of
    what was added to the trainable leaves: if these are finite, so is the new state where the old one was.

    On a ``mesh``, ``where`` are the shardings of the state, which the new one has too.
    """
    arguments.check("make_step", {"apply": apply, "tx": tx, "mesh": mesh}, optional=("mesh",))

    def micro_gradient(trainable, frozen, micro, rng):
        def loss(leaves):
            return batch_loss(apply, tree.combine(frozen, leaves), micro, chunk=loss_chunk, rngs={"dropout": rng},
                              error=error, mesh=mesh)

        return jax.value_and_grad(loss, has_aux=True)(trainable)

    def accumulate(state, frozen, batch):
        rng = jax.random.fold_in(state.rng, state.step)

        def add(total, indexed):
            index, micro = indexed
            found = micro_gradient(state.trainable, frozen, micro, jax.random.fold_in(rng, index))
            return jax.tree.map(jnp.add, total, found), None

        count = batch["input_ids"].shape[0]
        if count == 1:
            only = jax.tree.map(lambda x: x[0], batch)
            return micro_gradient(state.trainable, frozen, only, jax.random.fold_in(rng, 0))
        zero = ((jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, state.trainable))
        return jax.lax.scan(add, zero, (jnp.arange(count), batch))[0]

    def step(state, frozen, batch):
        (loss, weight), gradient = accumulate(state, frozen, batch)
        weight = jnp.maximum(weight, 1)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        if penalty is not None:
            more = jax.grad(lambda leaves: penalty(tree.combine(frozen, leaves)))(state.trainable)
            gradient = jax.tree.map(jnp.add, gradient, more)
        updates, opt_state = tx.update(gradient, state.opt_state, state.trainable)
        metrics = {"loss": loss / weight, "grad_norm": optax.tree.norm(gradient),
                   "update_norm": optax.tree.norm(updates)}
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state, state.rng), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=None if where is None else (where, None))
