"""Checks of the arguments of public functions: two swapped ones are an error of one line.

A name of an argument means the same in all public functions. ROLES says how to recognise it, and what to give.
"""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax.errors import PeftJaxError


def is_method(value: Any) -> bool:
    """Whether ``value`` is a ``peft_jax.Method``, which lives on a higher floor: known by what it has."""
    return isinstance(value, tuple) and hasattr(value, "intercept") and hasattr(value, "labels")


def is_model(value: Any) -> bool:
    return hasattr(value, "apply") and not isinstance(value, type)


def is_optimizer(value: Any) -> bool:
    """Whether ``value`` is an optax transformation; one of a user's own need be no tuple."""
    return hasattr(value, "init") and hasattr(value, "update") and not isinstance(value, type | Mapping)


def is_function(value: Any) -> bool:
    return callable(value) and not is_model(value) and not isinstance(value, type)


def is_labels(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(leaf, str) for leaf in jax.tree.leaves(value))


def is_variables(value: Any) -> bool:
    """Whether ``value`` is what ``model.init`` gives: parameters one level below."""
    return isinstance(value, Mapping) and isinstance(value.get("params"), Mapping)


def is_params(value: Any) -> bool:
    return isinstance(value, Mapping) and not is_variables(value) and (not value or not is_labels(value))


def is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike)


def is_key(value: Any) -> bool:
    """Whether ``value`` is a random key, typed or of the old kind, uint32 (2,)."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == "uint32")


_PARAMS = (is_params, "the whole parameter tree, such as method.init(rng, params) makes")
_BASE = (is_params, "the parameters of the base model, such as load_pretrained gives")
_OPTIMIZER = (is_optimizer, "an optax transformation, such as optax.adamw(1e-4)")
# {the name of an argument: (how to know what it takes, what to give)}
ROLES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (is_method, "a method, such as peft_jax.lora(r=8)"),
    "model": (is_model, "the model itself, such as load_pretrained gives"),
    "params": _PARAMS,
    "base": _BASE,
    "base_params": _BASE,
    "trainable": (is_params, "the first tree of partition(params, method)"),
    "labels": (lambda value: is_labels(value) or is_method(value), "method.labels(params), or the method"),
    "mesh": (lambda value: isinstance(value, Mesh), "a mesh, such as peft_jax.make_mesh() makes"),
    "optimizer": _OPTIMIZER,
    "tx": _OPTIMIZER,
    "apply": (is_function, "model.apply, or what peft_jax.bind(method, model) gives"),
    "forward": (is_function, "a function of the parameters"),
    "loss": (is_function, "a function of the parameters that gives a scalar"),
    "rng": (is_key, "a random key, such as jax.random.key(0)"),
    "folder": (is_path, "the path of a folder"),
    "source": (is_path, "a folder, a .gguf file or a Hub id"),
}


def _is_typed_key(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def check(function: str, values: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Raise ``PeftJaxError`` for the first argument that is not what its name stands for in :data:`ROLES`.

    Args:
      function: its name.
      values: ``{name: value}`` in the function's order.
      optional: names of arguments that may be ``None``.
    """
    for name, value in values.items():
        fits, words = ROLES[name]
        if not fits(value) and not (name in optional and value is None):
            raise PeftJaxError(f"{function}: {name} is {described(value)}: give {words}. The order is {function}("
                               f"{', '.join(values)}).")


def check_tree(function: str, value: Any) -> None:
    """Raise ``PeftJaxError`` where ``value`` is no nested dict."""
    if not isinstance(value, Mapping):
        raise PeftJaxError(f"{function}: the tree is {described(value)}: give nested dicts of arrays.")


def described(value: Any) -> str:
    """What ``value`` is, in a few words."""
    known = {"a Method": is_method, "a model": is_model, "an optax transformation": is_optimizer, "labels": is_labels,
             "a tree with 'params' inside": is_variables, "a parameter tree": is_params, "a random key": _is_typed_key}
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return next((words for words, fits in known.items() if fits(value)), f"of type {type(value).__name__}")
