"""Tensors of a checkpoint, read one at a time, into the leaves of a parameter tree."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import quant, targets
from peft_jax.errors import PeftJaxError
from peft_jax.hub.names import Place

Convert = Callable[..., Any]  # see peft_jax.Method


def stack(stored: Mapping[str, Any], places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]],
          dtype: jnp.dtype, convert: Convert | None = None, keep: bool = True) -> dict[str, Any]:
    """``{path: leaf}``: each tensor goes straight to its place in the stack, so no second copy of it exists.

    Args:
      stored: by Hugging Face's name, what has a ``read()`` that gives an array in their layout, or a quantised entry in
        ours.
      convert: a method's; each entry goes through it before the next is read, so that no more than one is plain.
      keep: whether entries that are quantised in the file stay so.

    Raises ``PeftJaxError`` where the layers of a stack are not quantised alike, or ``convert`` does.
    """
    parts: dict[str, dict[int | None, str]] = {}
    for name, place in places.items():
        parts.setdefault(place.path, {})[place.layer] = name
    leaves = {}
    for path, layers in parts.items():
        front = () if None in layers else (len(layers),)
        leaf = None
        for layer, name in layers.items():  # nothing here may hold on to an entry while the next is read
            leaf = _put(leaf, front, layer, dtype, name,
                        converted(convert, path, front, _entry(stored[name], places[name], dtype, convert, keep)))
        leaves[path] = jax.tree.map(partial(jax.device_put, may_alias=True), leaf)
    return leaves


def converted(convert: Convert | None, path: str, front: tuple[int, ...], entry: Any) -> Any:
    """``entry``, one of the stack ``front`` of the leaf ``path``, as the method wants it."""
    if convert is None:
        return entry
    return convert(path, entry, targets.plain_axes(entry.shape), targets.module_names(path.rpartition("/")[0], front))


def _entry(tensor, place, dtype, convert, keep):
    """A tensor in our layout; plain ones are cast where a method is to see them, else when they are put in place."""
    value = tensor.read()
    if quant.is_leaf(value):
        value = dataclasses.replace(value, plain_dtype=dtype.name)
        return value if keep else np.asarray(quant.dequantize(value))
    value = value.T if place.transposed else value
    return value if convert is None else value.astype(dtype, copy=False)


def _put(leaf, front, layer, dtype, name, entry):
    """``leaf``, whose buffers are made for the first entry, with ``entry`` in it."""
    quantised = quant.is_leaf(entry)
    if leaf is None:
        leaf = jax.tree.map(lambda part: _aligned((*front, *part.shape), part.dtype if quantised else dtype), entry)
    if jax.tree.structure(leaf) != jax.tree.structure(entry):
        have, others = (_told(one) for one in (entry, leaf))
        raise PeftJaxError(f"'{name}' is {have}, the same weight of the layers before it {others}, and here they are "
                           "one leaf: load_pretrained(..., keep_quantised=False), with a method=quantize(...) if all "
                           "are to be quantised.")
    leaf = jax.tree.map(_wide_enough, leaf, entry) if quantised else leaf
    for buffer, part in zip(jax.tree.leaves(leaf), jax.tree.leaves(entry), strict=True):
        buffer[... if layer is None else layer] = part
    return leaf


def _told(leaf) -> str:
    if not quant.is_leaf(leaf):
        return "plain"
    double = ", doubly" * leaf.double_quant
    return f"quantised{double} ({leaf.quant_type}, blocks of {leaf.block_size or 'a whole row'})"


def _wide_enough(buffer, part):
    """The buffer, in float32 where scales of float16, as GGUF's are, stand in one stack with such."""
    wide = np.result_type(buffer.dtype, part.dtype)
    return buffer if wide == buffer.dtype else buffer.astype(wide)


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array at an address that is a multiple of 64, so that jax on the CPU takes it over uncopied."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start:start + size].view(dtype).reshape(shape)
