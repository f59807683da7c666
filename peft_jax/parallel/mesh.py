"""The devices as a named grid, and how rows of a batch lie on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from peft_jax.errors import PeftJaxError

AXES = ("data", "fsdp", "tensor")
# Rows are split over both: with rows whole on "fsdp" the compiler would leave weights where they are and sum partial
# products, tensor parallelism under another name.
ROWS = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``devices``, by default all there are, of all processes.

    Args:
      data: copies of the model, each with rows of its own.
      fsdp: parts that every weight is cut into; each device gathers a layer's weights when it needs them, and has rows
        of its own.
      tensor: parts of every layer's computation: heads, and the MLP's inner features; devices sum their results.

    One of the three may be -1: what is left. Without, the mesh may be smaller than the devices of a single process: it
    takes the first ones. Raises ``PeftJaxError`` for other sizes below 1 and where the product does not fit.

    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    words = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if odd := [name for name, size in sizes.items() if isinstance(size, bool) or not isinstance(size, int) or
               (size < 1 and size != -1)]:
        raise PeftJaxError(f"mesh.{odd[0]}={sizes[odd[0]]!r}: give a whole number of devices, or -1 for what is left.")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise PeftJaxError(f"mesh: {' and '.join(free)} are both -1: one alone can be what is left.")
    fixed, count = math.prod(size for size in sizes.values() if size != -1), len(devices)
    if (free and count % fixed) or fixed > count or (fixed < count and not free and jax.process_count() > 1):
        fits = [size for size in range(1, count + 1) if count % size == 0]
        raise PeftJaxError(f"mesh {words} does not fit {count} device{'s' * (count > 1)}: choose sizes of "
                           f"{', '.join(map(str, fits))} whose product is {count}; one may be -1, for what is left.")
    devices = devices if free else devices[:fixed]
    shape = [count // fixed if size == -1 else size for size in sizes.values()]
    if devices == jax.devices():
        return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def describe_mesh(mesh: Mesh) -> str:
    """
    >>> describe_mesh(make_mesh(devices=jax.devices()[:1]))
    '1 device: data 1 x fsdp 1 x tensor 1'
    """
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{mesh.size} device{'s' * (mesh.size > 1)}: {sizes}"


def several(mesh: Mesh | None) -> Mesh | None:
    """``mesh`` if it is of several devices, else ``None``: on one device nothing has to be placed."""
    return mesh if mesh is not None and mesh.size > 1 else None


def row_shards(mesh: Mesh | None) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[name] for name in ROWS) if mesh else 1


def rows_apart(mesh: Mesh | None, x: Any, axis: int = 0) -> Any:
    """``x``, traced, with its rows, which run along ``axis``, split over the mesh; other axes as the compiler likes.

    Left as it is where the rows cannot be split evenly.
    """
    if mesh is None or not several(mesh) or x.ndim <= axis or x.shape[axis] % row_shards(mesh):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * x.ndim
    free[axis] = ROWS
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*free)))


def output_apart(mesh: Mesh | None, output: Any) -> Any:
    """What a module gave, with its rows split; only of an array that has tokens or places and features behind them."""
    return rows_apart(mesh, output) if isinstance(output, jax.Array) and output.ndim > 2 else output


def features_together(mesh: Mesh, table: Any) -> Any:
    """An embedding (vocab, features), traced, cut over "tensor" alone, along its vocabulary where that can be."""
    vocab = "tensor" if table.shape[0] % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(table, NamedSharding(mesh, PartitionSpec(vocab, None)))


def feed(mesh: Mesh | None, batch: Mapping[str, Any], axis: int = 0) -> Mapping[str, Any]:
    """A batch of numpy arrays on the mesh, rows, along ``axis``, split; each process brings the rows of its devices.

    Without a mesh they go to the default device. Rows that cannot be split evenly are on every device.
    """
    if mesh is None or not several(mesh):
        return jax.device_put(batch)

    def put(array):
        split = array.shape[axis] % row_shards(mesh) == 0
        where = NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS) if split else PartitionSpec())
        return jax.make_array_from_callback(array.shape, where, array.__getitem__)

    return {name: put(array) for name, array in batch.items()}


def fetch(array: Any) -> np.ndarray:
    """A device array as a numpy array, whole, on every process, whichever process's devices hold its parts."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
