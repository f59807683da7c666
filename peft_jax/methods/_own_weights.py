"""Methods that train leaves of the model itself: what they share.

A leaf that trains in all its layers trains in place, in float32; ``<method>/<its path with dots>`` at the root of the
tree is then a frozen scalar of the type it had. Of a stacked leaf that trains in some layers only, those layers lie
there instead, (n, ...) in float32, and the leaf itself stays frozen: optimiser state and gradients exist for what
trains, nothing else. The frozen ``<method>_at`` (*stack) beside such a leaf says which entry is each layer's, -1 none.

The copies are at the root because a scan slices every leaf below it, all by the same length; the forward pass looks
them up from there, layer by layer. (Adding them into the stack first would copy all of it and its gradient.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import quant
from peft_jax.core import arguments, kernel_axes, targeting, tree
from peft_jax.core.peft_format import PREFIX, Naming, Slot
from peft_jax.errors import PeftJaxError
from peft_jax.method import FROZEN, TRAINABLE, check_leaves

PLAIN = ("kernel", "bias", "scale", "embedding")  # what flax calls the parameters of its own modules
Wanted = Callable[[str, str], bool]  # (path of a leaf, name of its module in one layer) -> whether it trains


def init(method: str, params: Mapping[str, Any], axes: Mapping[str, kernel_axes.KernelAxes] | None, wanted: Wanted,
         required: bool = True) -> tree.Tree:
    """``params`` with the leaves that ``wanted`` chooses made trainable; ``method`` is the root folder for its marks.

    Raises ``PeftJaxError`` where nothing is chosen, a chosen leaf is no plain float array, or marks are there already.
    """
    flat = tree.flatten_arrays(params)
    if method in params:
        raise PeftJaxError(f"the parameters already hold '{method}' leaves: start from the base's, or merge first.")
    new, marks, stacks = dict(flat), {}, targeting.stacks(flat, axes)
    before = marks_of(flat)
    others = {mark for own in before.values() for mark in own}
    for path, leaf in flat.items():
        folder, _, name = path.rpartition("/")
        if path in others or (name.endswith("_at") and name.removesuffix("_at") in params):
            continue  # another such method's
        on = np.array([wanted(path, module) for module in targeting.module_names(folder, stacks[folder])], bool)
        if not on.any():
            continue
        _check_trainable(path, leaf)
        mark = f"{method}/{path.replace('/', '.')}"
        if on.all():
            kept = [flat[one].dtype for one in before.get(path, ()) if not flat[one].ndim]  # it is float32 already
            new[path], marks[mark] = jnp.asarray(leaf, jnp.float32), jnp.zeros((), (*kept, leaf.dtype)[0])
        else:
            marks[mark] = leaf.reshape(len(on), *leaf.shape[len(stacks[folder]):])[on].astype(jnp.float32)
            at = np.where(on, np.cumsum(on) - 1, -1).reshape(stacks[folder])
            new[f"{folder}/{method}_at"] = jnp.asarray(at, jnp.float32)
    if required and not marks:
        raise PeftJaxError(f"{method} leaves nothing to train in this model.")
    return tree.unflatten(new | marks)


def _check_trainable(path: str, leaf: Any) -> None:
    if quant.is_leaf(leaf):
        raise quant.cannot_train(path, leaf)
    if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise PeftJaxError(f"'{path}' cannot train: it is no plain array of floating-point numbers. Leave it out.")


def marks_of(flat: Mapping[str, Any]) -> dict[str, list[str]]:
    """The marks and copies, of any such method, of each leaf that has some, by path."""
    dotted = {path.replace("/", "."): path for path in flat if "/" in path}
    marks: dict[str, list[str]] = {}
    for mark in flat:
        if path := dotted.get(mark.partition("/")[2]):
            marks.setdefault(path, []).append(mark)
    return marks


def labels(method: str, params: Mapping[str, Any]) -> tree.Tree:
    """``"trainable"`` for leaves that train in place and for the layers' copies."""
    arguments.check_tree("labels", params)
    marks = params.get(method, {})
    copies = {f"{method}/{name}" for name, mark in marks.items() if mark.ndim}

    def label(path: str, leaf: Any) -> str:
        mark = marks.get(path.replace("/", "."))
        return TRAINABLE if path in copies or (mark is not None and not mark.ndim) else FROZEN

    return tree.map_paths(label, params)


def intercept(method: str, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Call a module that trains in some layers only with this layer's own leaves."""
    module = context.module
    if context.method_name not in ("__call__", "attend") or not module.has_variable("params", f"{method}_at"):
        return next_fun(*args, **kwargs)
    own = dict(module.variables["params"])
    at = own.pop(f"{method}_at")
    place = tree.join(module.path)
    _check_alone(method, place, own)
    if next_fun is not context.orig_method:
        raise PeftJaxError(f"'{place}' trains in some layers only, by {method}: name {method} first in the chain.")
    with jax.named_scope(kernel_axes.own_scope(place)):  # whatever it computes, it does so with these leaves
        for name, leaf in own.items():
            copies = context.params[method].get(tree.join((*module.path, name)).replace("/", "."))
            if copies is not None and copies.ndim:
                copy = copies[jnp.maximum(at, 0).astype(jnp.int32)]
                own[name] = jnp.where(at >= 0, copy, leaf.astype(jnp.float32))
        return module.clone(parent=None).apply({"params": own}, *args, method=context.method_name, **kwargs)


def _check_alone(method: str, place: str, names: Iterable[str]) -> None:
    """Neither the forward pass nor a merge could tell which of two methods changes a layer's leaf first."""
    if other := [name for name in names if name not in PLAIN]:
        raise PeftJaxError(f"'{place}' trains in some layers only, by {method}, and has '{other[0]}' beside: use one "
                           "method for it, or train all its layers.")


def merge(method: str, params: Mapping[str, Any]) -> tree.Tree:
    """The plain tree: copies back in their places, every leaf in the type it had."""
    check_leaves(leaves(method), params, method)
    flat = tree.flatten(params)
    marks = {path: flat.pop(path) for path in list(flat) if path.startswith(f"{method}/")}
    places = {f"{method}/{path.replace('/', '.')}": path for path in flat}
    spots = {path.rpartition("/")[0]: flat.pop(path) for path in list(flat) if path.endswith(f"/{method}_at")}
    for mark, copies in marks.items():
        path = places[mark]
        folder, leaf = path.rpartition("/")[0], flat[path]
        if copies.ndim:
            _check_alone(method, folder, [p.rpartition("/")[2] for p in flat if p.rpartition("/")[0] == folder])
            flat[path] = _put(leaf, copies, spots[folder])
        else:
            flat[path] = leaf.astype(copies.dtype)
    return tree.unflatten(flat)


def _put(leaf: jax.Array, copies: jax.Array, at: jax.Array) -> jax.Array:
    """``leaf`` with ``copies`` (n, ...) in the layers where ``at`` (*stack) is not negative."""
    own = copies[jnp.maximum(at, 0).astype(jnp.int32)].astype(leaf.dtype)
    return jnp.where((at >= 0).reshape(*at.shape, *[1] * (leaf.ndim - at.ndim)), own, leaf)


def slots(method: str, flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
          key: Callable[[str, str], str]) -> dict[str, Slot]:
    """The tensors of all trained leaves. ``key(path of the model's leaf, tensor's name)`` is the name in the file."""
    places = {f"{method}/{path.replace('/', '.')}": path for path in flat}
    tensors = {}
    for path in trained:
        original = places.get(path, path) if path.startswith(f"{method}/") else path
        named = list(_whole(naming, original).items())
        entries = range(len(named))
        if original != path:
            entries = np.ravel(flat[f"{original.rpartition('/')[0]}/{method}_at"]).astype(int)
            entries = entries if len(entries) == len(named) else [0]  # other models: one tensor for all copies
        for (name, _), entry in zip(named, entries, strict=True):
            if entry >= 0:
                tensors[PREFIX + key(original, name)] = Slot(path, named[entry][1].view)
    return tensors


def _whole(naming: Naming, path: str) -> dict[str, Slot]:
    """The leaf's tensors; of an embedding that is also the head the one name, not both."""
    named = naming.whole(path)
    return dict([*named.items()][:1]) if path.endswith("/embedding") else named


def bound(method: str) -> dict[str, Any]:
    """The functions of a method but for ``init``, and its leaves, as keyword arguments of :class:`peft_jax.Method`."""
    return {"intercept": partial(intercept, method), "labels": partial(labels, method),
            "fold": partial(merge, method), "leaves": leaves(method)}


def leaves(method: str) -> tuple[str, ...]:
    """The folder of marks and copies, and the leaf beside one that trains in some layers only."""
    return f"{method}/", f"{method}_at"


def modules(flat: Mapping[str, Any], axes: Mapping[str, kernel_axes.KernelAxes] | None) -> list[targeting.Target]:
    """Every module that owns leaves, with its names; their layout is not known."""
    unknown = kernel_axes.KernelAxes("module", (), (), ())
    return [targeting.Target(folder, unknown._replace(stack=stack), targeting.module_names(folder, stack))
            for folder, stack in targeting.stacks(flat, axes).items()]


def check_names(argument: str, patterns: targeting.Patterns, names: Sequence[str]) -> None:
    """Raise ``PeftJaxError`` for an entry of ``patterns`` that matches none of ``names``."""
    if (said := targeting.unmatched(patterns, names)) is not None:
        tied = " A head that is tied to the embedding has none: peft_jax.untie(params) gives it one."
        raise PeftJaxError(f"{argument} has '{said}', which is no such module with weights of this model: "
                           f"{targeting.suggestion(patterns, said, names)}"
                           f"{tied if said.endswith('lm_head') else ''}")
