"""Tensors of a checkpoint, read one at a time, into the leaves of a parameter tree."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import quant
from peft_jax.core import kernel_axes, targeting
from peft_jax.errors import PeftJaxError
from peft_jax.hub.families.hf_names import Place

Convert = Callable[..., Any]  # see peft_jax.Method
Where = Callable[[str, Any], Any]
_CHUNK = 1 << 20  # elements that are looked at together, so that they stay in the processor's cache


def stack(stored: Mapping[str, Any], places: Mapping[str, Place], dtype: jnp.dtype, convert: Convert | None = None,
          keep: bool = True, where: Where | None = None) -> dict[str, Any]:
    """``{path: leaf}``: each tensor goes straight to its place in the stack, so no second copy of it exists.

    Args:
      stored: by Hugging Face's name, what has a ``read()`` that gives an array in their layout, or a quantised entry in
        ours.
      convert: a method's; each entry goes through it before the next is read, so that no more than one is plain.
      keep: whether entries that are quantised in the file stay so.
      where: ``(path, leaf of shapes) -> leaf of shardings``, of a mesh: of each tensor only what this process's devices
        hold is kept, and one leaf's part after the other goes to them. By default all is on the default device.

    Raises ``PeftJaxError`` where the layers of a stack are not quantised alike, a tensor holds NaN or infinity or what
    ``dtype`` makes that of, or ``convert`` does.
    """
    parts: dict[str, dict[int | None, str]] = {}
    for name, place in places.items():
        parts.setdefault(place.path, {})[place.layer] = name
    leaves = {}
    for path, layers in parts.items():
        front = () if None in layers else (len(layers),)
        leaf = None
        for layer, name in layers.items():  # nothing here may hold on to an entry while the next is read
            leaf = _put(leaf, front, layer, dtype, name, partial(where, path) if where else None,
                        converted(convert, path, front, _entry(name, stored[name], places[name], dtype, convert, keep)))
        leaves[path] = jax.tree.map(Parts.on_devices, leaf, is_leaf=lambda node: isinstance(node, Parts))
    return leaves


class Parts:
    """A stacked array in the making, as the parts of it that this process's devices hold: numpy buffers."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None):
        self.shape, self.dtype, self.sharding = shape, dtype, sharding
        whole = {None: tuple(map(slice, shape))}
        self.places: Mapping[Any, Any] = (  # device: slices
            sharding.addressable_devices_indices_map(shape) if sharding else whole)
        self.buffers = {str(index): _aligned(_extent(shape, index), dtype) for index in self.places.values()}

    def put(self, layer: int | None, entry: np.ndarray) -> None:
        """Write ``entry``, all of it or one of the stack, into the parts that have some of it."""
        for key, index in {str(index): index for index in self.places.values()}.items():
            at = ... if layer is None else layer - (index[0].start or 0)
            self.buffers[key][at] = entry[index if layer is None else index[1:]]

    def widened(self, dtype: Any) -> "Parts":
        """The same in ``dtype`` if that holds more: float32, where scales of float16, as GGUF's are, meet such."""
        self.dtype = np.result_type(self.dtype, dtype)
        self.buffers = {key: buffer.astype(self.dtype, copy=False) for key, buffer in self.buffers.items()}
        return self

    def on_devices(self) -> jax.Array:
        """The array; the buffers are given away."""
        if self.sharding is None:
            return jax.device_put(self.buffers.popitem()[1], may_alias=True)
        arrays = [jax.device_put(self.buffers[str(index)], device) for device, index in self.places.items()]
        self.buffers = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def _extent(shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(len(range(*one.indices(size))) for one, size in zip(index, shape, strict=True))


def converted(convert: Convert | None, path: str, front: tuple[int, ...], entry: Any) -> Any:
    """``entry``, one of the stack ``front`` of the leaf ``path``, as the method wants it."""
    if convert is None:
        return entry
    names = targeting.module_names(path.rpartition("/")[0], front)
    return convert(path, entry, kernel_axes.plain_axes(entry.shape), names)


def _entry(name, tensor, place, dtype, convert, keep):
    """A tensor in our layout; plain ones are cast where a method is to see them, else when they are put in place."""
    value = tensor.read()
    for part in jax.tree.leaves(value):
        _check_finite(name, part, dtype)
    if quant.is_leaf(value):
        value = dataclasses.replace(value, plain_dtype=dtype.name)
        return value if keep else np.asarray(quant.dequantize(value))
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise PeftJaxError(f"the tensor '{name}' is of type {value.dtype}, and weights are floats: the file is "
                           "damaged, or quantised in a way that is not read; fetch it again, or take another.")
    value = value.T if place.transposed else value
    return value if convert is None else value.astype(dtype, copy=False)


def _check_finite(name: str, array: np.ndarray, dtype: jnp.dtype) -> None:
    """Raise ``PeftJaxError`` where a tensor holds no numbers, of which training would make NaN at its first step."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return
    if not finite(array):
        raise PeftJaxError(f"the tensor '{name}' holds NaN or infinity: the file is damaged, or its training diverged; "
                           "fetch it again, or take another checkpoint.")
    with np.errstate(over="ignore"):
        fits = jnp.finfo(dtype).max >= jnp.finfo(array.dtype).max or finite(array.astype(dtype))
    if not fits:
        raise PeftJaxError(f"the tensor '{name}' holds numbers beyond {dtype}, which would be infinity: load it in "
                           "bfloat16 or float32.")


def finite(array: np.ndarray) -> bool:
    """Whether an array of floating-point numbers holds neither NaN nor infinity.

    Of 16 bits by their exponents, since numpy looks at such numbers one by one and a model has gigabytes of them.

    >>> finite(np.ones(3, np.float32)), finite(np.array([1, np.inf], np.float16))
    (True, False)
    """
    exponents = {"float16": 0x7C00, "bfloat16": 0x7F80}
    if array.dtype.name not in exponents:
        return bool(np.isfinite(array).all())
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint16)
    mask = np.uint16(exponents[array.dtype.name])
    return not any(((words[at:at + _CHUNK] & mask) == mask).any() for at in range(0, len(words), _CHUNK))


def _put(leaf, front, layer, dtype, name, where, entry):
    """``leaf``, whose buffers are made for the first entry, with ``entry`` in it."""
    quantised = quant.is_leaf(entry)
    if leaf is None:
        shapes = jax.tree.map(lambda part: jax.ShapeDtypeStruct((*front, *part.shape), part.dtype if quantised else
                                                                dtype), entry)
        lies = where(shapes) if where else shapes
        leaf = jax.tree.map(lambda part, sharding: Parts(part.shape, part.dtype, sharding if where else None),
                            dataclasses.replace(shapes, gathered=lies.gathered) if quantised else shapes, lies)
    if quantised and quant.is_leaf(leaf):
        entry = dataclasses.replace(entry, gathered=leaf.gathered)
    if jax.tree.structure(leaf) != jax.tree.structure(entry):
        have, others = (_told(one) for one in (entry, leaf))
        raise PeftJaxError(f"'{name}' is {have}, the same weight of the layers before it {others}, and here they are "
                           "one leaf: load_pretrained(..., keep_quantised=False), with a method=quantize(...) if all "
                           "are to be quantised.")
    for held, part in zip(jax.tree.leaves(leaf), jax.tree.leaves(entry), strict=True):
        (held.widened(part.dtype) if quantised else held).put(layer, part)
    return leaf


def _told(leaf) -> str:
    if not quant.is_leaf(leaf):
        return "plain"
    double = ", doubly" * leaf.double_quant
    return f"quantised{double} ({leaf.quant_type}, blocks of {leaf.block_size or 'a whole row'})"


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An empty array at an address that is a multiple of 64, so that jax on the CPU takes it over uncopied."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start:start + size].view(dtype).reshape(shape)
