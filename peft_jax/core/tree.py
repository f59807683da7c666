"""Parameter trees: paths, path rules, splitting and joining. The only code that walks a tree by path.

A parameter tree is nested dicts of arrays, as ``model.init(...)["params"]`` gives. A path is the dict keys joined by
``/``: ``layers/self_attn/q_proj/kernel``. Only dicts are walked: anything else, a quantised leaf too, is one leaf.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from peft_jax.errors import PeftJaxError

Tree = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{path: leaf}`` in the order of the tree.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of :func:`flatten`. Raises ``PeftJaxError`` where a path is both a leaf and a folder."""
    tree: Tree = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise PeftJaxError(f"'{path}' lies below '{folder}', which is already a leaf: rename one of them.")
        if isinstance(node.get(name), dict):
            raise PeftJaxError(f"'{path}' is a leaf here and a folder elsewhere: rename one of them.")
        node[name] = leaf
    return tree


def map_paths(function: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """The tree with each leaf replaced by ``function(path, leaf)``."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def first_match(rules: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """The value of the first ``(regex, value)`` rule whose regex matches the whole path, else ``default``.

    >>> first_match([(".*/kernel", "decay"), (".*", "none")], "mlp/kernel", None)
    'decay'
    """
    return next((value for regex, value in rules if re.fullmatch(regex, path)), default)


def partition(params: Mapping[str, Any], labels: Mapping[str, Any], frozen: str = "frozen") -> tuple[Tree, Tree]:
    """Split ``params`` into ``(trainable, frozen)`` by label; leaves of the other part are absent, not ``None``.

    Every label but ``frozen`` counts as trainable, so that a method may name groups with rates of their own. The first
    tree is all that needs a gradient, an optimiser state, or a place in a checkpoint. Raises ``PeftJaxError`` where
    ``labels`` and ``params`` do not have the same leaves.
    """
    flat, names = flatten(params), flatten(labels)
    if flat.keys() != names.keys():
        odd = sorted(flat.keys() ^ names.keys())
        raise PeftJaxError(f"labels and params differ in {len(odd)} leaves, the first is '{odd[0]}': "
                           "make the labels from these params, with method.labels(params).")
    held = {path: leaf for path, leaf in flat.items() if names[path] == frozen}
    return unflatten({path: leaf for path, leaf in flat.items() if path not in held}), unflatten(held)


def combine(*trees: Mapping[str, Any]) -> Tree:
    """Join trees leaf by leaf; where two have the same leaf the later one wins, so ``combine(base, adapter)`` switches.

    Inverse of :func:`partition`: ``combine(*partition(params, labels))`` has the leaves of ``params``.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def count(tree: Any) -> int:
    """Elements of all leaves; of a quantised one those of the array that it stands for."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "size")))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, of arrays or of their shapes; of a quantised one those of its packed buffers.

    >>> nbytes({"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}), nbytes(jax.eval_shape(jax.random.key, 0))
    (12, 8)
    """
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(leaf) -> int:
    if not hasattr(leaf, "dtype"):
        return 0
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return math.prod(leaf.shape) * leaf.dtype.itemsize
