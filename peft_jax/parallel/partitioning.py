"""Where each leaf lies on a mesh: rules beside each model, and for a method's leaves what follows from their kernel.

A model has ``sharding``, a tuple of ``(regex over the whole path, axes of the mesh)``, the first match wins. The axes
are those of the leaf without its stack of layers in front, ``None`` for one that stays whole: a kernel (inputs,
outputs) with ``("fsdp", "tensor")`` has its inputs cut over "fsdp". Which rule is which is Megatron-LM's column and row
parallelism (arXiv:1909.08053, section 3) with ZeRO's third stage (arXiv:1910.02054) on the other axis.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from peft_jax import quant
from peft_jax.core import arguments, tree
from peft_jax.core.kernel_axes import HOLDERS, KernelAxes
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method, owns

Axis = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, tuple[Axis, ...]]]
LARGE = 1 << 20  # bytes; what is smaller may lie whole on every device


def shardings(method: Method | None, model: Any, params: Mapping[str, Any], mesh: Mesh,
              axes: Mapping[str, KernelAxes] | None = None, large: int = LARGE) -> tree.Tree:
    """A ``NamedSharding`` for each leaf of ``params``, of a quantised one a leaf of its type that holds them.

    Args:
      method: whose leaves are among ``params``, ``None`` for the base's alone. A leaf beside a kernel lies as
        ``method.along`` says. If it is large and that does not cut it over "fsdp", its widest axis is cut so, the first
        left out.
      model: its ``sharding`` are the rules.
      params: arrays or their shapes.
      mesh: of :func:`peft_jax.make_mesh`.
      axes: of :func:`peft_jax.kernel_axes`, where kernels have more than two axes besides their stack.
      large: bytes from which a leaf must be covered.

    An axis of the mesh that does not divide an axis of the leaf, in a quantised one its blocks, moves to another axis
    of that leaf; small leaves stay whole. Raises ``PeftJaxError`` for a large leaf that no rule covers or that cannot
    be divided so, for quantised leaves with a fused product, for ``params`` without the method's leaves, and for a
    model without ``sharding``.
    """
    _check("shardings", method, model, params, mesh)
    return by_rules(params, mesh, model.sharding, method, axes, large)


def place(method: Method | None, model: Any, params: Mapping[str, Any], mesh: Mesh,
          axes: Mapping[str, KernelAxes] | None = None) -> tree.Tree:
    """``params`` on the mesh, each leaf, quantised or not, where :func:`shardings` says.

    What lies there already is not copied. Arguments and errors as of :func:`shardings`.

    >>> from peft_jax import lora, make_mesh
    >>> from peft_jax.models import CausalLM, LlamaConfig
    >>> model = CausalLM(LlamaConfig(99, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 256, True))
    >>> base = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    >>> method, mesh = lora(r=4), make_mesh(devices=jax.devices()[:1])
    >>> params = place(method, model, method.init(jax.random.key(1), base), mesh)
    >>> params["norm"]["scale"].sharding.mesh == mesh
    True
    """
    _check("place", method, model, params, mesh)
    return put(params, by_rules(params, mesh, model.sharding, method, axes))


def _check(function: str, method, model, params, mesh) -> None:
    arguments.check(function, {"method": method, "model": model, "params": params, "mesh": mesh}, optional=("method",))
    if method is not None:
        tree.check_method_leaves(method, params)
    if not hasattr(model, "sharding"):
        raise PeftJaxError(f"{function}: a {type(model).__name__} has no rules: give its class a field sharding, such "
                           "as ((\".*/kernel\", (\"fsdp\", \"tensor\")),).")


def by_rules(params: Mapping[str, Any], mesh: Mesh, rules: Rules, method: Method | None = None,
             axes: Mapping[str, KernelAxes] | None = None, large: int = LARGE) -> tree.Tree:
    """As :func:`shardings`, of ``rules`` in place of a model; ``params`` may be a part of a tree."""
    flat = tree.flatten(params)
    lie = partial(_sharding, flat, mesh, rules, method, axes or {}, large)
    return tree.unflatten({path: lie(path, leaf) for path, leaf in flat.items()})


def put(params: Mapping[str, Any], where: Mapping[str, Any]) -> tree.Tree:
    """``params`` on their ``where``, of :func:`shardings`; what lies there already is not copied."""
    targets = tree.flatten(where)
    return tree.map_paths(lambda path, leaf: jax.device_put(_lying(leaf, targets[path]), targets[path]), params)


def _lying(leaf, where) -> Any:
    """``leaf``, which if it is quantised knows where its codes come together, so that its structure is ``where``'s."""
    return replace(leaf, gathered=where.gathered) if quant.is_leaf(leaf) else leaf


def init(method: Method, rng: jax.Array, base: Mapping[str, Any], mesh: Mesh, rules: Rules,
         axes: Mapping[str, KernelAxes] | None = None) -> tree.Tree:
    """``method.init(rng, base, axes)`` for a base that lies on a mesh: leaves are made where they will lie.

    Compiled as one program, of which leaves that the method leaves alone are no part. Errors as of ``method.init`` and
    :func:`shardings`.
    """
    if mesh.size == 1:
        return method.init(rng, base, axes=axes)

    def new_leaves(rng, base):
        before = tree.flatten(base)
        after = tree.flatten(method.init(rng, base, axes=axes))
        return {path: leaf for path, leaf in after.items() if leaf is not before.get(path)}

    shapes = jax.eval_shape(new_leaves, rng, base)
    whole = tree.combine(base, tree.unflatten(shapes))
    everywhere = tree.flatten(by_rules(whole, mesh, rules, method, axes))
    where = {path: everywhere[path] for path in shapes}

    def lying(rng, base):
        return {path: _lying(leaf, where[path]) for path, leaf in new_leaves(rng, base).items()}

    return tree.combine(base, tree.unflatten(jax.jit(lying, out_shardings=where)(rng, base)))


def shapes(params: Mapping[str, Any], where: Mapping[str, Any]) -> tree.Tree:
    """The shapes of ``params``, each with its sharding: to compile for devices without having the arrays."""
    targets = tree.flatten(where)

    return tree.map_paths(lambda path, leaf: jax.tree.map(shape_at, _lying(leaf, targets[path]), targets[path]), params)


def shape_at(part: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array, or of a shape, that lies at ``where``."""
    return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=where)


def like(state: Any, leaves: Mapping[str, Any], mesh: Mesh) -> Any:
    """Shardings of what an optimiser keeps: a moment lies as its leaf does, everything else whole on every device.

    Args:
      state: a pytree of arrays or shapes in which trees like ``leaves`` occur.
      leaves: arrays that lie on the mesh, or shapes with their shardings.
    """
    flat = tree.flatten(leaves)

    def of(path, leaf):
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        for start in range(len(keys)):
            name = tree.join(keys[start:])
            if name in flat and flat[name].shape == leaf.shape:
                return flat[name].sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, state)


def _sharding(flat, mesh, rules, method, axes, large, path: str, leaf) -> Any:
    spec = _spec(flat, rules, method, axes, path, leaf)
    big = tree.nbytes(leaf) >= large
    own = method and owns(method.leaves, path)
    if spec is None and big and mesh.size > 1 and not own:
        raise PeftJaxError(f"no rule says how '{path}' {tuple(leaf.shape)} is to be split over the mesh: add one to "
                           f"the model's sharding, such as (\"{path}\", (\"fsdp\", None)), or () to keep it whole.")
    fit = partial(_fitted, mesh, path if big else None)
    if quant.is_leaf(leaf):
        return _of_quantised(leaf, spec or (), mesh, fit, path)
    if big and own and "fsdp" not in (spec or ()):
        spec = spec or (None,) * (leaf.ndim - 1)  # the first axis may be a stack, which a scan slices
        spec = tuple(_cut(mesh, leaf.shape[leaf.ndim - len(spec):], _names(spec), "fsdp"))
    spec = fit(leaf.shape[leaf.ndim - len(spec or ()):], spec or ())
    return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - len(spec)), *spec))


def _spec(flat, rules, method, axes, path: str, leaf) -> tuple[Axis, ...] | None:
    """By the model's rules, or by those of the kernel that a method's leaf is beside; ``None`` where neither says."""
    folder, _, name = path.rpartition("/")
    if not (method and owns(method.leaves, path)):
        return tree.first_match(rules, path, None)
    if not (words := method.along.get(name)):
        return None
    kernel = next((f"{folder}/{holder}".lstrip("/") for holder in HOLDERS if f"{folder}/{holder}".lstrip("/") in flat),
                  "")
    beside = tree.first_match(rules, kernel, None)
    if not beside:
        return None
    inputs = len(axes[kernel].inputs) if kernel in axes else 1
    parts = {"inputs": beside[:inputs], "outputs": beside[inputs:], None: (None,)}
    return tuple(axis for word in words for axis in parts[word])


def _fitted(mesh: Mesh, large: str | None, sizes: Sequence[int], spec: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """``spec`` with axes of the mesh that do not divide their size moved to where they do; ``large`` names a leaf for
    which there must be such a place.

    >>> from peft_jax import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> _fitted(mesh, None, (3, 4), ("fsdp", None))
    (('fsdp',), ())
    """
    names = _names(spec)
    cuts = [axes if _divides(mesh, size, axes) else () for size, axes in zip(sizes, names, strict=True)]
    for name in [name for before, after in zip(names, cuts, strict=True) if before != after for name in before]:
        more = _cut(mesh, sizes, cuts, name)
        if more == cuts and large:
            raise PeftJaxError(f"'{large}' cannot be split over {name}={mesh.shape[name]}: neither of its axes, which "
                               f"are {' and '.join(map(str, sizes))} values or blocks wide, is a multiple; choose "
                               f"another --config.mesh.{name}.")
        cuts = more
    return tuple(cuts)


def _names(spec: tuple[Axis, ...]) -> list[tuple[str, ...]]:
    return [(axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in spec]


def _cut(mesh: Mesh, sizes: Sequence[int], names: list[tuple[str, ...]], name: str) -> list[tuple[str, ...]]:
    """``names`` of each axis with ``name`` at the widest of those that it divides; as they are where there is none."""
    free = [i for i, size in enumerate(sizes) if _divides(mesh, size, (*names[i], name))]
    best = max(free, key=lambda i: sizes[i], default=None)
    return [(*axes, name) if i == best else axes for i, axes in enumerate(names)]


def _divides(mesh: Mesh, size: int, names: Sequence[str]) -> bool:
    return size % math.prod(mesh.shape[name] for name in names) == 0


def _of_quantised(leaf, spec, mesh, fit, path: str) -> Any:
    """Codes and scales lie alike, cut between blocks. The mean and nested scales, 1/16384 of the codes, stay whole."""
    if leaf.product != "plain" and mesh.size > 1:
        raise PeftJaxError(f"'{path}' is multiplied by a fused kernel, which knows one device: use "
                           "quantize(product=\"plain\") on a mesh.")
    rows, columns = fit(*_matrix_sides(leaf, spec))
    whole = NamedSharding(mesh, PartitionSpec())
    matrix = NamedSharding(mesh, PartitionSpec(*[None] * len(leaf.stack), rows, columns))
    together = [tuple(name for name in names if name != "fsdp") for names in (rows, columns)]
    return replace(leaf, codes=matrix, scales=matrix, nested=leaf.nested if leaf.nested is None else whole,
                   mean=leaf.mean if leaf.mean is None else whole,
                   offsets=leaf.offsets if leaf.offsets is None else matrix,
                   gathered=NamedSharding(mesh, PartitionSpec(*together)))


def _matrix_sides(leaf, spec) -> tuple[tuple[int, ...], tuple[Axis, ...]]:
    """Of a quantised leaf's matrix, as it is stored: (rows and blocks, how ``spec`` cuts them)."""
    inputs = len(leaf.inputs)
    spec = (*spec, *[None] * (inputs + len(leaf.outputs) - len(spec)))
    # Of several axes that are one here only the first, the slowest, can be cut.
    sides = (spec[0], spec[inputs]) if inputs and leaf.outputs else (None, None)
    sizes = (leaf.inputs[0], leaf.outputs[0]) if inputs and leaf.outputs else (1, 1)
    if not leaf.by_rows:
        sides, sizes = sides[::-1], sizes[::-1]
    blocks = leaf.scales.shape[-1]
    if not leaf.flat:
        return (sizes[0], blocks), sides
    even = leaf.codes.shape[-1] % blocks == 0  # rows run on into each other: (1, everything)
    return (1, blocks if even else 1), (None, "fsdp" if "fsdp" in sides else None)
