"""The sum of parts: what stands in memory and why, each part from shapes and with its recipe."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax import quant, tree
from peft_jax.loss import pick, summed_loss
from peft_jax.planner.liveness import kept, loops


class Part(NamedTuple):
    """name, bytes, and in words what it is made of. ``counted``: whether it adds to the sum, or is a part of another,
    or never there at the same time as a larger one."""

    name: str
    bytes: int
    recipe: str
    counted: bool = True


def sum_of_parts(apply: Callable, trainable: tree.Tree, frozen: tree.Tree, opt_state: Any, others: Any,
                 batch: Mapping[str, jax.ShapeDtypeStruct], loss_chunk: int, error: Callable) -> list[Part]:
    """The parts of one training step, all from shapes.

    Args:
      apply: of :func:`peft_jax.bind`. trainable, frozen, opt_state, batch: shapes, as the step is given them; leaves
        of ``batch`` are (accumulate_steps, rows, ...).
      others: what else the step is given, such as its number.
      loss_chunk, error: as of ``make_step``.

    What is alive inside a layer and inside the loss counts without fusion, and the larger of the two is counted.
    """
    states, again, dtype = _within(apply, trainable, frozen, batch, loss_chunk, error)
    return [*_arguments(trainable, frozen, opt_state, (batch, others)),
            *_gradients(trainable, batch),
            Part("activations kept", states, "what the backward pass keeps of the forward pass"),
            *_working(again, frozen, dtype, loss_chunk)]


def total(parts: list[Part]) -> int:
    """Bytes of all parts that count."""
    return sum(part.bytes for part in parts if part.counted)


def _arguments(trainable, frozen, opt_state, others) -> list[Part]:
    packed = {path: leaf for path, leaf in tree.flatten(frozen).items() if quant.is_leaf(leaf)}
    other = {path: leaf for path, leaf in tree.flatten(frozen).items() if path not in packed}
    trained = tree.count(trainable)
    parts = [Part("quantised weights", tree.nbytes(packed), _packed_recipe(packed))] if packed else []
    return [*parts,
            Part("other frozen weights", tree.nbytes(other), f"{tree.count(other):,} in {_dtypes(other)}"),
            Part("trained parameters", tree.nbytes(trainable), f"{trained:,} in {_dtypes(trainable)}"),
            Part("optimiser state", tree.nbytes(opt_state),
                 f"{tree.nbytes(opt_state) / max(trained, 1):.1f} bytes for each of them"),
            Part("batch", tree.nbytes(others), "token ids, positions, segments, answers; the step's number, a key")]


def _packed_recipe(packed) -> str:
    kinds = {f"{leaf.quant_type}, blocks of {leaf.block_size or 'a row'}"
             f"{', scales in 8 bits' if leaf.double_quant else ''}" for leaf in packed.values()}
    weights = sum(leaf.size for leaf in packed.values())
    return f"{weights:,} in {'; '.join(sorted(kinds))}: {8 * tree.nbytes(packed) / weights:.3f} bits each"


def _dtypes(leaves) -> str:
    return ", ".join(sorted({np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(leaves)})) or "nothing"


def _gradients(trainable, batch) -> list[Part]:
    several = batch["input_ids"].shape[0] > 1
    recipe = "as the trained parameters" + (", their sum and a micro-batch's" if several else "")
    return [Part("gradients", tree.nbytes(trainable) * (1 + several), recipe)]


def _working(again: tuple[int, int], frozen, dtype, loss_chunk: int) -> list[Part]:
    layer, loss = again
    decoded = [leaf for leaf in tree.flatten(frozen).values() if quant.is_leaf(leaf)]
    parts = [Part("one layer, forward and back", layer, "its activations again, their gradients, decoded weights",
                  layer >= loss)]
    if decoded:
        size = sum(leaf.size // math.prod(leaf.stack) for leaf in decoded) * dtype.itemsize
        parts.append(Part("  decoded weights of a layer", size, f"all of them, in {dtype.name}", False))
    return [*parts, Part("loss chunk", loss, f"logits of {loss_chunk} answers and their gradient", loss > layer)]


def _within(apply, trainable, frozen, batch, chunk, error) -> tuple[int, tuple[int, int], np.dtype]:
    """(bytes kept for the backward pass, (the most alive inside a layer, inside the loss), type of the states)."""
    micro = {name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for name, leaf in batch.items()}

    def hidden(trainable, frozen, micro):
        states = apply({"params": tree.combine(frozen, trainable)}, micro["input_ids"], positions=micro["positions"],
                       segment_ids=micro["segment_ids"], rngs={"dropout": jax.random.key(0)}, method="hidden")
        return pick(states, micro["loss_index"])

    def back(trainable, frozen, micro, gradient):
        return jax.vjp(lambda leaves: hidden(leaves, frozen, micro), trainable)[1](gradient)

    def loss(states, trainable, frozen, micro):
        def head(one):
            return apply({"params": tree.combine(frozen, trainable)}, one, method="head")

        return jax.grad(lambda x: summed_loss(head, x, micro["loss_target"], micro["loss_weight"], chunk, error)[0])(
            states)

    states = jax.eval_shape(hidden, trainable, frozen, micro)
    alive = (loops(back, trainable, frozen, micro, states), loops(loss, states, trainable, frozen, micro))
    most = tuple(max(found, default=0) for found in alive)
    return kept(hidden, trainable, frozen, micro), most, np.dtype(states.dtype)
