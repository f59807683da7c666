"""The sum of parts: what stands in memory and why, each part from shapes and with its recipe."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax import quant
from peft_jax.core import tree
from peft_jax.parallel.mesh import row_shards
from peft_jax.planner.liveness import kept, loops
from peft_jax.planner.shapes import Shapes
from peft_jax.train.loss import pick, states_of, summed_loss

GROUPS = ("weights", "gradients", "optimiser", "activations", "logits", "batch")


class Part(NamedTuple):
    """name, bytes of one device, in words what it is made of, and which of ``GROUPS`` it belongs to. ``counted``:
    whether it adds to the sum, or is a part of another, or never there at the same time as a larger one."""

    name: str
    bytes: int
    recipe: str
    group: str
    counted: bool = True


def sum_of_parts(shapes: Shapes, loss_chunk: int, error: Callable) -> list[Part]:
    """The parts of one training step, all from shapes. ``loss_chunk``, ``error``: as of ``make_step``.

    Of what is alive inside a layer and inside the loss, see :func:`peft_jax.planner.liveness.peak`, the larger counts.
    On a mesh they are those of one device: what the step is given exactly, as it is cut; activations and logits by
    tracing with the rows of one device, as if nothing of them were cut over "tensor", which bounds them from above.
    """
    found = _within(shapes, loss_chunk, error)
    return [*_weights(shapes.trainable, shapes.frozen), *_gradients(shapes.trainable, shapes.batch),
            _optimiser(shapes.opt_state, tree.count(shapes.trainable)),
            *_working(*found, shapes, loss_chunk),
            *_gathered(shapes),
            Part("batch", held((shapes.batch, *OTHERS)), "token ids, positions, lengths, answers; the step's number, "
                 "a key", "batch")]


OTHERS = (jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((2,), np.uint32))  # of a state: its number, its key


def held(leaves: Any) -> int:
    """Bytes that one device holds of arrays or shapes that may know where they lie."""
    return sum(tree.nbytes(shard(leaf)) for leaf in jax.tree.leaves(leaves))


def shard(leaf: Any) -> Any:
    """The shape of one device's part of ``leaf``."""
    where = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(where.shard_shape(leaf.shape), leaf.dtype) if where is not None else leaf


def _uncut(mesh) -> str:
    words = ", of one device's rows" if mesh else ""
    return words + (", as if not cut over tensor: an upper bound" if mesh and mesh.shape["tensor"] > 1 else "")


def total(parts: list[Part]) -> int:
    """Bytes of all parts that count."""
    return sum(part.bytes for part in parts if part.counted)


def groups(parts: list[Part]) -> dict[str, int]:
    """``{group: bytes}`` of the parts that count, in the order of ``GROUPS``."""
    return {name: total([part for part in parts if part.group == name]) for name in GROUPS}


def _weights(trainable, frozen) -> list[Part]:
    packed = {path: leaf for path, leaf in tree.flatten(frozen).items() if quant.is_leaf(leaf)}
    other = {path: leaf for path, leaf in tree.flatten(frozen).items() if path not in packed}
    parts = [Part("quantised weights", held(packed), _packed_recipe(packed), "weights")] if packed else []
    return [*parts, Part("other frozen weights", held(other), f"{tree.count(other):,} in {_dtypes(other)}", "weights"),
            Part("trained parameters", held(trainable), f"{tree.count(trainable):,} in {_dtypes(trainable)}",
                 "weights")]


# What an optax state keeps for each parameter, by the state's type.
KEEPS = {"ScaleByAdamState": "two moments (Adam)", "ScaleByBeliefState": "two moments (AdaBelief)",
         "ScaleByLionState": "one moment (Lion)", "ScaleByRmsState": "one mean of squares (RMSProp)",
         "TraceState": "one momentum (SGD with momentum)", "FactoredState": "factored squares (Adafactor)"}


def _optimiser(state, trained: int) -> Part:
    kinds = [KEEPS[name] for name in dict.fromkeys(state_types(state)) if name in KEEPS]
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    what = f"{', '.join(kinds)} in {_dtypes(arrays)}" if kinds and arrays else "whatever this optimiser keeps"
    each = f"{tree.nbytes(state) / max(trained, 1):.1f} bytes for each trained parameter"
    return Part("optimiser state", held(state), f"{each}: {what}" if arrays else "no array: plain SGD keeps nothing",
                "optimiser")


def state_types(state) -> list[str]:
    """The names of the types in a nested state, outer ones first."""
    inner = list(state.values()) if isinstance(state, dict) else state if isinstance(state, tuple | list) else []
    return [type(state).__name__, *(name for one in inner for name in state_types(one))]


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
    return [Part("gradients", held(trainable) * (1 + several), recipe, "gradients")]


def _working(layers: tuple[int, int], loss: tuple[int, int], dtype, shapes: Shapes, loss_chunk: int) -> list[Part]:
    """What the forward pass left and what is made of it, in the layers or in the loss: the larger of the two counts."""
    inside = sum(layers) >= sum(loss)
    decoded = [leaf for leaf in tree.flatten(shapes.frozen).values() if quant.is_leaf(leaf)]
    parts = [Part("activations kept", (layers if inside else loss)[0], "what the backward pass keeps of the forward "
                  "pass" + _uncut(shapes.mesh), "activations"),
             Part("one layer, forward and back", layers[1], "its activations again, their gradients"
                  + _uncut(shapes.mesh), "activations", inside)]
    if decoded:
        size = sum(leaf.size // math.prod(leaf.stack) for leaf in decoded) * dtype.itemsize
        parts.append(Part("decoded weights of a layer", size, f"all of them, in {dtype.name}: waiting for nothing, "
                          "they may be decoded early", "activations", inside))
    return [*parts, Part("loss chunk", loss[1], f"logits of {loss_chunk} answers and their gradient"
                         + _uncut(shapes.mesh), "logits", not inside)]


def _gathered(shapes: Shapes) -> list[Part]:
    """On a mesh whose "fsdp" cuts the weights: what a device receives of them to compute a layer."""
    if not shapes.mesh or shapes.mesh.shape["fsdp"] == 1:
        return []
    layers, more = shapes.model.config.num_hidden_layers, shapes.mesh.shape["fsdp"] - 1
    leaves = [leaf for leaf in tree.flatten(tree.combine(shapes.frozen, shapes.trainable)).values() if leaf.ndim]
    layer = sum(more * held(leaf) // layers for leaf in leaves if leaf.shape[0] == layers)
    widest = max((more * held(leaf) for leaf in leaves if leaf.shape[0] != layers), default=0)
    return [Part("weights gathered", max(layer, widest), "a layer's, or the embedding's, from other devices; at least "
                 "those: a compiler may fetch the next ones early", "weights")]


def _within(shapes: Shapes, chunk: int, error: Callable) -> tuple[tuple[int, int], tuple[int, int], np.dtype]:
    """((bytes that wait while a layer is computed, the most alive in it), the same of the loss, type of the states).

    In the loss all that the backward pass reads is there. In the layers what it read before them, the last norm's
    above all, is gone; but only a GPU's programs were seen to make use of that.
    """
    apply, (trainable, frozen) = shapes.alone, shapes.plain
    micro = {name: jax.ShapeDtypeStruct(shard(leaf).shape[1:], leaf.dtype) for name, leaf in shapes.batch.items()}

    def hidden(trainable, frozen, micro):
        states = states_of(apply, tree.combine(frozen, trainable), micro, {"dropout": jax.random.key(0)})
        return pick(states, micro["loss_index"])

    def back(trainable, frozen, micro, gradient):
        return jax.vjp(lambda leaves: hidden(leaves, frozen, micro), trainable)[1](gradient)

    def loss(states, trainable, frozen, micro):
        def head(one):
            return apply({"params": tree.combine(frozen, trainable)}, one, method="head")

        share = -(-chunk // row_shards(shapes.mesh))
        return jax.grad(lambda x: summed_loss(head, x, micro["loss_target"], micro["loss_weight"], share, error)[0])(
            states)

    states = jax.eval_shape(hidden, trainable, frozen, micro)
    left = kept(hidden, trainable, frozen, micro)
    turns = [(waits if shapes.gpu else left, most)
             for waits, most in loops(back, trainable, frozen, micro, states, adds=shapes.gpu)]
    chunks = max((most for _, most in loops(loss, states, trainable, frozen, micro, adds=shapes.gpu)), default=0)
    return max(turns, key=sum, default=(left, 0)), (left, chunks), np.dtype(states.dtype)
