"""A quantised base made plain before text is written: every token would decode its packed weights again.

A product with a packed weight decodes it in float32 and rounds it to the type that is computed in. So is it made plain
here, in that type, once: the same numbers are multiplied, in an order that the compiler may choose otherwise.
"""

import math
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax import quant
from peft_jax.core import tree, validation
from peft_jax.parallel import partitioning, processes
from peft_jax.parallel.mesh import several
from peft_jax.train.memory import free_memory

CHOICES = ("auto", "always", "never")
SHARE = 2 / 3  # of the free memory that plain weights may take: the cache and the activations need room, too


class Choice(NamedTuple):
    """How text is written: ``dequantize`` is "always" or "never", ``words`` say why. Where nothing is quantised it is
    as it was, and "" is said."""

    dequantize: str
    words: str


def choose(dequantize: str, model: Any, params: Mapping[str, Any], mesh: Mesh | None = None) -> Choice:
    """What ``dequantize`` comes to for these ``params``: "auto" is "always" where the plain weights fit the memory that
    is free now, and "never" where they do not, where nobody tells it, or where the weights have a fused product.

    Arguments as of :func:`unpacked`. Raises ``PeftJaxError`` for another word than those of ``CHOICES``.
    """
    validation.check_choice("dequantize", dequantize, CHOICES)
    packed = _packed(params)
    if not packed:
        return Choice(dequantize, "")
    if dequantize == "auto":
        return _by_memory(packed, model, mesh)
    return Choice(dequantize, _words(dequantize == "always", f"dequantize={dequantize}"))


def unpacked(model: Any, params: Mapping[str, Any], mesh: Mesh | None = None) -> tree.Tree:
    """``params`` with every quantised leaf as a plain array of ``model.dtype``, the type that is computed in; other
    leaves as they are.

    Args:
      model: the model of ``params``. One without ``dtype`` keeps the type that each leaf came in.
      mesh: on which ``params`` lie, if that is of several devices: the plain arrays lie there by the same rules.
    """
    packed = _packed(params)
    if not packed:
        return tree.combine(params)
    arrays = _decoded(packed, _dtype(model), tuple(_shardings(packed, model, mesh).items()))
    return tree.combine(params, tree.unflatten(arrays))


def as_chosen(dequantize: str, model: Any, params: tree.Tree, mesh: Mesh | None = None) -> tree.Tree:
    """``params`` to write with, as ``dequantize`` of :func:`choose` says."""
    chosen = choose(dequantize, model, params, mesh).dequantize
    return unpacked(model, params, mesh) if chosen == "always" else params


@partial(jax.jit, static_argnames=("dtype", "where"))
def _decoded(packed: Mapping[str, quant.QuantizedArray], dtype: Any, where: tuple) -> dict[str, jax.Array]:
    places = dict(where)

    def plain(path: str, leaf: quant.QuantizedArray) -> jax.Array:
        array = quant.layer_by_layer(leaf, dtype)
        return jax.lax.with_sharding_constraint(array, places[path]) if path in places else array

    return {path: plain(path, leaf) for path, leaf in packed.items()}


def _packed(params: Mapping[str, Any]) -> dict[str, quant.QuantizedArray]:
    return {path: leaf for path, leaf in tree.flatten(params).items() if quant.is_leaf(leaf)}


def _dtype(model: Any) -> Any:
    dtype = getattr(model, "dtype", None)
    return None if dtype is None else jnp.dtype(dtype)


def _shapes(packed: Mapping[str, quant.QuantizedArray], model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(leaf.shape, _dtype(model) or leaf.dtype) for path, leaf in packed.items()}


def _shardings(packed: Mapping[str, quant.QuantizedArray], model: Any, mesh: Mesh | None) -> dict[str, Any]:
    """Where each plain array lies, by the model's rules; {} on one device."""
    if mesh is None or not several(mesh):
        return {}
    shapes, rules = tree.unflatten(_shapes(packed, model)), getattr(model, "sharding", ())
    return tree.flatten(partitioning.by_rules(shapes, mesh, rules, large=sys.maxsize))  # none must be cut


def _by_memory(packed: Mapping[str, quant.QuantizedArray], model: Any, mesh: Mesh | None) -> Choice:
    if any(leaf.product != "plain" for leaf in packed.values()):
        return Choice("never", _words(False, "its product is fused"))
    need, free = _bytes(packed, model, mesh), free_memory()
    fits = processes.agreed(free is not None and need <= SHARE * free)
    room = "nobody tells how much is free" if free is None else f"{free / 1e9:.1f} GB are free"
    return Choice("always" if fits else "never", _words(fits, f"plain it takes {need / 1e9:.1f} GB, {room}"))


def _words(plain: bool, why: str) -> str:
    return f"text is written with {'plain weights, decoded once' if plain else 'packed weights'}: {why}"


def _bytes(packed: Mapping[str, quant.QuantizedArray], model: Any, mesh: Mesh | None) -> int:
    """Of the plain weights on one device, or, where devices are CPUs, on all of this host.

    On CPUs XLA multiplies bfloat16 in float32, and keeps such copies of the weights while it writes.
    """
    where, cpu = _shardings(packed, model, mesh), jax.local_devices()[0].platform == "cpu"
    values = {path: math.prod(where[path].shard_shape(leaf.shape) if where else leaf.shape)
              for path, leaf in packed.items()}
    sizes = {path: shape.dtype.itemsize for path, shape in _shapes(packed, model).items()}
    each = [count * (sizes[path] + 4 * (cpu and sizes[path] < 4)) for path, count in values.items()]
    return sum(each) * (mesh.local_mesh.size if cpu and mesh is not None else 1)
