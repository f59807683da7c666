"""Many LoRA adapters on one base: each row of a batch may use another, and a switch never recompiles.

    y_b = x_b W + s_k (x_b A_k) B_k        k: the adapter of row b, 0 for the base

Beside each kernel that any adapter changes stand ``mixed_a`` (*stack, K + 1, *in, R), ``mixed_b`` (*stack, K + 1, R,
*out) and ``mixed_scaling`` (*stack, K + 1): ranks are filled up with zeros to the largest R, entry 0 is all zeros. One
leaf at the root, ``mixed_rows``, says which to use: int32 () for the whole batch, or (batch,).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import arguments, kernel_axes, tree
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.method import FROZEN, Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora.leaves import Leaves, check_pair, on_base
from peft_jax.methods.lora.low_rank import branch, scaled

MIXED = ("mixed_a", "mixed_b", "mixed_scaling")
ROWS = "mixed_rows"
ALONG = {"mixed_a": (None, "inputs", None), "mixed_b": (None, None, "outputs")}


def mix_adapters(adapters: Mapping[str, tuple[Method, Mapping[str, Any]]],
                 base_params: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """One method and one tree that hold several LoRA adapters of one base; at first all rows use the base.

    Args:
      adapters: ``{name: (method, params)}`` as ``load_adapter`` gives them; ranks and targets may differ.
      base_params: the base's, without any adapter.

    Returns ``(method, params)`` for :func:`peft_jax.bind`; :func:`use_adapters` says who uses what. Nothing in it
    trains, there is no dropout, and it cannot be merged: merge the adapter alone.

    Raises ``PeftJaxError`` where there is no adapter, where one is no LoRA, trains leaves of the base too, or does not
    fit the base.
    """
    arguments.check("mix_adapters", {"base_params": base_params})
    if not adapters:
        raise PeftJaxError("mix_adapters() was given no adapter: name at least one.")
    if not isinstance(adapters, Mapping) or not all(isinstance(name, str) for name in adapters):
        raise PeftJaxError("mix_adapters() was given no dict by name: {'one': (method, params), 'two': ...}.")
    for name, pair in adapters.items():
        check_pair(pair, f"mix_adapters: adapter '{name}'")
    flat = dict(tree.flatten(base_params))
    if ROWS in flat:
        raise PeftJaxError("the parameters already hold mixed adapters: start from the base's.")
    leaves_of = {name: _lora_leaves(name, method, params, base_params) for name, (method, params) in adapters.items()}
    for folder in dict.fromkeys(folder for leaves in leaves_of.values() for folder in leaves):
        flat |= _stacked(folder, [leaves.get(folder) for leaves in leaves_of.values()])
    names = tuple(adapters)
    method = Method(init=_made_elsewhere, intercept=_intercept, labels=_all_frozen, fold=None,
                    config={"peft_type": "MIXED", "adapters": names}, leaves=(*MIXED, ROWS), along=ALONG)
    return method, tree.unflatten({**flat, ROWS: jnp.zeros((), jnp.int32)})


def use_adapters(method: Method, params: Mapping[str, Any], names: str | Sequence[str | None] | None) -> dict[str, Any]:
    """``params`` in which the whole batch uses the adapter of one name, or each row that of its own; ``None`` is the
    base.

    The tree's shapes depend on the number of rows alone, so a jitted function is compiled once for all choices.

    Raises ``PeftJaxError`` for an unknown name, naming the nearest, and for a method or params that are not
    ``mix_adapters``'s.
    """
    if not arguments.is_method(method) or method.config["peft_type"] != "MIXED":
        raise PeftJaxError("use_adapters: this method was not made by mix_adapters(): give (method, params) as it made "
                           "them.")
    if not isinstance(params, Mapping) or ROWS not in params:
        raise PeftJaxError(f"use_adapters: the params have no '{ROWS}': give those that mix_adapters() made.")
    every = method.config["adapters"]
    single = names is None or isinstance(names, str)
    wishes = (names,) if single else tuple(names) if isinstance(names, Iterable) else ()
    if not wishes or not all(name is None or isinstance(name, str) for name in wishes):
        raise PeftJaxError(f"use_adapters: names={names!r}: give the name of one adapter, or a list with one for each "
                           f"row, None for the base: {', '.join(every)}.")
    for name in wishes:
        if name is not None and name not in every:
            raise PeftJaxError(f"use_adapters: there is no adapter '{name}': {nearest(str(name), every)}")
    numbers = np.array([0 if name is None else 1 + every.index(name) for name in wishes], np.int32)
    return {**params, ROWS: jnp.asarray(numbers[0] if single else numbers)}


def _lora_leaves(name, method, params, base_params) -> Leaves:
    _, leaves = on_base(method, params, base_params, f"adapter '{name}'")
    flat = tree.flatten(base_params)
    if embedded := [folder for folder in leaves if f"{folder}kernel" not in flat]:
        raise PeftJaxError(f"adapter '{name}' changes the embedding '{embedded[0]}': rows of one batch can differ in "
                           "linear layers only; switch with peft_jax.combine(base, adapter) instead.")
    return leaves


def _stacked(folder: str, adapters: Sequence[list[np.ndarray] | None]) -> dict[str, jax.Array]:
    """The three mixed leaves of one module, in the order of the adapters, zeros first."""
    a, b, scaling = next(leaves for leaves in adapters if leaves)
    most, axis = max(leaves[0].shape[-1] for leaves in adapters if leaves), scaling.ndim
    wide = (*a.shape[:-1], most), (*b.shape[:axis], most, *b.shape[axis + 1:])
    parts = [[np.zeros(shape, np.float32)] for shape in (*wide, scaling.shape)]
    for leaves in adapters:
        for part, leaf in zip(parts, leaves or [part[0] for part in parts], strict=True):
            part.append(np.zeros_like(part[0]))
            part[-1][tuple(map(slice, leaf.shape))] = leaf
    return {folder + name: jnp.asarray(np.stack(part, axis)) for name, part in zip(MIXED, parts, strict=True)}


def _made_elsewhere(rng, params, axes=None):
    raise PeftJaxError("mixed adapters are made from trained ones, by mix_adapters(): there is nothing to init.")


def _all_frozen(params) -> tree.Tree:
    return tree.map_paths(lambda path, leaf: FROZEN, params)


def _intercept(next_fun, args, kwargs, context):
    module = context.module
    y = next_fun(*args, **kwargs)
    if context.method_name != "__call__" or not module.has_variable("params", MIXED[0]):
        return y
    kernel_adapter.check_kind(module, "a mixed LoRA")
    if not context.of_flax:
        return y
    mixed = [module.get_variable("params", name) for name in MIXED]
    rows, x = context.params[ROWS], kernel_axes.inputs_last(module, args[0]).astype(y.dtype)
    if rows.ndim == 0:
        return y + branch(x, *(leaf[rows] for leaf in mixed)).reshape(y.shape)
    if rows.shape[0] != x.shape[0]:
        raise PeftJaxError(f"use_adapters() named {rows.shape[0]} rows, the batch has {x.shape[0]}: name one adapter "
                           "for each row, or one for all.")
    return y + jax.vmap(_row)(x, *(leaf[rows] for leaf in mixed)).reshape(y.shape)


def _row(x, a, b, scaling):
    rank = a.shape[-1]
    low = x.reshape(-1, a.size // rank) @ a.astype(x.dtype).reshape(-1, rank)
    return scaled(low, scaling) @ b.astype(x.dtype).reshape(rank, -1)
