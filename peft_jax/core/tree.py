"""Parameter trees: paths, path rules, splitting and joining. The only code that walks a tree by path.

A parameter tree is nested dicts of arrays, as ``model.init(...)["params"]`` gives. A path is the dict keys joined by
``/``: ``layers/self_attn/q_proj/kernel``. A slash in a key, as flax's WeightNorm makes some, is written ``%2F`` there,
and ``%`` is ``%25``. Only dicts are walked: anything else, a quantised leaf too, is one leaf.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import arguments, patterns
from peft_jax.errors import PeftJaxError

Tree = dict[str, Any]


def join(keys: Iterable[str]) -> str:
    """The path of ``keys``, such as a module's ``path``.

    >>> join(("norm", "up/kernel", "scale"))
    'norm/up%2Fkernel/scale'

    Raises ``PeftJaxError`` for a key that is no string.
    """
    return "/".join(map(_escaped, keys))


def _escaped(key: Any) -> str:
    if not isinstance(key, str):
        raise PeftJaxError(f"a tree has the key {key!r}: keys are strings, as those of flax.linen's parameters are; "
                           "rename it.")
    return key.replace("%", "%25").replace("/", "%2F")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{path: leaf}`` in the order of the tree.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}

    Raises ``PeftJaxError`` where ``tree`` is no dict, or has a key that is no string.
    """
    arguments.check_tree("flatten", tree)
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{_escaped(key)}" if prefix else _escaped(key)
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = value
    return flat


def flatten_arrays(params: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`flatten` of a tree whose leaves are arrays, or shapes of some.

    Raises ``PeftJaxError`` for any other leaf, such as one in a box of ``nn.with_partitioning``.
    """
    flat = flatten(params)
    check_arrays(flat)
    return flat


def check_arrays(flat: Mapping[str, Any]) -> None:
    """Raise ``PeftJaxError`` for the first leaf of a flat tree that is no array, nor the shape of one."""
    for path, leaf in flat.items():
        if not hasattr(leaf, "shape"):
            unbox = ": params = flax.core.meta.unbox(params) first" if hasattr(leaf, "unbox") else ""
            raise PeftJaxError(f"the leaf '{path}' is {arguments.described(leaf)}: give arrays{unbox}.")


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of :func:`flatten`. Raises ``PeftJaxError`` where a path is both a leaf and a folder."""
    arguments.check_tree("unflatten", flat)
    tree: Tree = {}
    for path, leaf in flat.items():
        *folders, name = (key.replace("%2F", "/").replace("%25", "%") for key in path.split("/"))
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise PeftJaxError(f"'{path}' lies below '{folder}', which is already a leaf: rename one of them.")
        if isinstance(node.get(name), dict):
            raise PeftJaxError(f"'{path}' is a leaf here and a folder elsewhere: rename one of them.")
        node[name] = leaf
    return tree


def map_paths(function: Callable[[str, Any], Any], tree: Mapping[str, Any], prefix: str = "") -> Any:
    """The tree with each leaf replaced by ``function(path, leaf)``; a FrozenDict stays one.

    >>> map_paths(lambda path, leaf: f"{path} is {leaf}", {"a": {"b": 1}})
    {'a': {'b': 'a/b is 1'}}
    """
    arguments.check_tree("map_paths", tree)
    mapped: Tree = {}
    kind: Any = type(tree)
    for key, value in tree.items():
        path = f"{prefix}/{_escaped(key)}" if prefix else _escaped(key)
        mapped[key] = map_paths(function, value, path) if isinstance(value, Mapping) else function(path, value)
    return mapped if isinstance(tree, dict) else kind(mapped)


def first_match(rules: Iterable[tuple[str, Any]], path: str, default: Any) -> Any:
    """The value of the first ``(regex, value)`` rule whose regex matches the whole path, else ``default``.

    >>> first_match([(".*/kernel", "decay"), (".*", "none")], "mlp/kernel", None)
    'decay'
    """
    return next((value for regex, value in rules if patterns.match(regex, path, whole=True)), default)


def partition(params: Mapping[str, Any], labels: Any, frozen: str = "frozen") -> tuple[Tree, Tree]:
    """Split ``params`` into ``(trainable, frozen)`` by label; leaves of the other part are absent, not ``None``.

    Every label but ``frozen`` counts as trainable: a method may name groups that learn at rates of their own. Only the
    first tree needs gradients, an optimiser state, and a place in a checkpoint.

    Args:
      params: the whole tree.
      labels: the method, or a string for each leaf, as ``method.labels(params)`` gives.

    Raises ``PeftJaxError`` where ``labels`` and ``params`` do not have the same leaves, and where ``params`` lack the
    method's own.

    >>> from peft_jax import lora
    >>> method = lora(r=2, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> list(partition(params, method)[0]["up_proj"])
    ['lora_a', 'lora_b']
    """
    arguments.check("partition", {"params": params, "labels": labels})
    if arguments.is_method(labels):
        check_method_leaves(labels, params)
        labels = labels.labels(params)
    flat, names = flatten(params), flatten(labels)
    if flat.keys() != names.keys():
        odd = sorted(flat.keys() ^ names.keys())
        raise PeftJaxError(f"labels and params differ in {len(odd)} leaves, the first is '{odd[0]}': "
                           "make the labels from these params, with method.labels(params).")
    rest = {path: leaf for path, leaf in flat.items() if names[path] == frozen}
    return unflatten({path: leaf for path, leaf in flat.items() if path not in rest}), unflatten(rest)


def combine(*trees: Mapping[str, Any]) -> Tree:
    """Join trees leaf by leaf; where two have the same leaf the later one wins, so ``combine(base, adapter)`` switches.

    Inverse of :func:`partition`: ``combine(*partition(params, labels))`` has the leaves of ``params``. Raises
    ``PeftJaxError`` for what is no tree.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        arguments.check_tree("combine", tree)
        flat |= flatten(tree)
    return unflatten(flat)


def owns(leaves: Sequence[str], path: str) -> bool:
    """Whether the leaf at ``path`` is one of a method's ``leaves``, or in one of its folders.

    >>> owns(("lora_a", "full/"), "q_proj/lora_a"), owns(("full/",), "full/norm.scale"), owns(("lora_a",), "lora_a/b")
    (True, True, False)
    """
    folders = [f"/{name}" for name in leaves if name.endswith("/")]
    return path.rpartition("/")[2] in leaves or any(folder in f"/{path}" for folder in folders)


def check_leaves(leaves: Sequence[str], params: Mapping[str, Any], whose: str = "the method") -> None:
    """Raise ``PeftJaxError`` where ``params`` hold none of ``leaves``, if there are such."""
    if leaves and not any(owns(leaves, path) for path in flatten(params)):
        raise PeftJaxError(f"the parameters hold none of {whose}'s leaves ({', '.join(leaves)}): "
                           "params = method.init(rng, params) first; what was merged holds none either.")


def check_method_leaves(method: Any, params: Mapping[str, Any]) -> None:
    """Raise ``PeftJaxError`` where ``params`` lack all leaves of the method, or of one part of a chain.

    Without them the forward pass is the base model's, and nothing would say so.
    """
    for part in method.parts:
        check_method_leaves(part, params)
    if not method.parts:
        check_leaves(method.leaves, params, method.config["peft_type"])


def count(tree: Any) -> int:
    """The number of elements of all leaves. A quantised leaf counts as the array that it stands for.

    Raises ``PeftJaxError`` for a leaf that is no array, nor the shape of one.
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: hasattr(node, "size"))
    _check_arrays("count", tree, leaves)
    return sum(leaf.size for leaf in leaves)


def nbytes(tree: Any) -> int:
    """The bytes of all leaves, which are arrays or shapes. A quantised leaf counts with its packed buffers.

    >>> nbytes({"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}), nbytes(jax.eval_shape(jax.random.key, 0))
    (12, 8)

    Raises ``PeftJaxError`` where ``tree`` is a method or a model.
    """
    _check_arrays("nbytes", tree, ())
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _check_arrays(function: str, tree: Any, leaves: Sequence[Any]) -> None:
    if arguments.is_method(tree) or arguments.is_model(tree):
        raise PeftJaxError(f"{function} was given {arguments.described(tree)}: give a tree of arrays.")
    if odd := [leaf for leaf in leaves if not hasattr(leaf, "size")]:
        raise PeftJaxError(f"{function}: a leaf is {arguments.described(odd[0])}, which is no array: give a tree of "
                           "arrays.")


def _bytes(leaf) -> int:
    if not hasattr(leaf, "dtype"):
        return 0
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return math.prod(leaf.shape) * leaf.dtype.itemsize
