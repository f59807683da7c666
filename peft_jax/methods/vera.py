"""VeRA, vectors between random projections that all modules share (arXiv 2310.11454, eq. 2).

    y = x W + (drop(x) A * d) B * b

A (in, r) and B (r, out) are random, frozen and one pair for the whole model: the root leaves ``vera_a`` (largest in, r)
and ``vera_b`` (r, largest out), of which each module takes its corner. Beside each adapted ``kernel`` stand the trained
vectors ``vera_lambda_d`` (*stack, r) and ``vera_lambda_b`` (*stack, *out), and the frozen switch ``vera_on`` (*stack),
zero for layers of a stack that are not adapted. b starts at zero, so that training starts from the base model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import kernel_axes, targeting, tree, validation
from peft_jax.core.peft_format import Naming, Slot, arguments_of
from peft_jax.core.remat import keep
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method, check_leaves
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter

VECTORS = ("vera_lambda_b", "vera_lambda_d")
LEAVES = (*VECTORS, "vera_on")
SHARED = {"vera_a": "base_model.vera_A", "vera_b": "base_model.vera_B"}
BIASES = ("none", "all", "vera_only")


def vera(r: int = 256, target_modules: Patterns = ("q_proj", "v_proj"), vera_dropout: float = 0.0, *,
         d_initial: float = 0.1, projection_prng_key: int = 0, bias: str = "none",
         layers_to_transform: int | tuple[int, ...] | None = None, layers_pattern: Patterns = None,
         modules_to_save: tuple[str, ...] | None = None, init_weights: bool = True) -> Method:
    """VeRA with the arguments, meanings and defaults of Hugging Face peft's ``VeraConfig``.

    Args:
      r: rank of the shared projections. vera_dropout: probability that an input element of the branch is dropped;
        needs ``rngs={"dropout": key}``.
      d_initial: what d starts at.
      projection_prng_key: seed of A and B, the same for every run. torch draws other numbers from it than jax, so
        adapter files always hold A and B (peft's ``save_projection=True``) and are read only where they do.
      bias: which biases train: "none", "all", "vera_only" (of adapted modules).
      init_weights: False starts b at one and d at random (not the base model at the start; for tests).
      The others as of :func:`peft_jax.lora`.

    Returns a :class:`Method`; its leaves are float32.

    >>> method = vera(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items() if name.startswith("vera")}
    {'vera_lambda_b': (8,), 'vera_lambda_d': (4,), 'vera_on': ()}
    >>> params["vera_a"].shape, params["vera_b"].shape
    ((6, 4), (4, 8))

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing.
    """
    config = kernel_adapter.tidy(
        peft_type="VERA", r=r, target_modules=target_modules, vera_dropout=vera_dropout, d_initial=d_initial,
        projection_prng_key=projection_prng_key, bias=bias, layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern, modules_to_save=modules_to_save, init_weights=init_weights)
    validation.check_rank("r", r)
    validation.check_probability("vera_dropout", vera_dropout)
    validation.check_number("d_initial", d_initial)
    validation.check_choice("bias", bias, BIASES)
    validation.check_switches(config, "init_weights")
    if not isinstance(projection_prng_key, int):
        raise PeftJaxError(f"projection_prng_key={projection_prng_key!r}: a seed is a whole number.")
    method = kernel_adapter.method(config, trained=VECTORS, switch="vera_on", leaves=_leaves,
                                   intercept=partial(_intercept, vera_dropout), stored=FORMAT)
    return method._replace(init=partial(_init, config, method), fold=_merge, leaves=(*LEAVES, *SHARED),
                           vectors=VECTORS)


def _init(config: Mapping[str, Any], method: Method, rng: jax.Array, params: Mapping[str, Any],
          axes: Mapping[str, Any] | None = None) -> tree.Tree:
    targets = targeting.find(params, axes, kernel_adapter.selection(config))
    inputs, outputs = (max(math.prod(side) for side in sides)
                       for sides in zip(*((target.axes.inputs, target.axes.outputs) for target in targets)))
    one, other = jax.random.split(jax.random.key(config["projection_prng_key"]))
    # peft's bound: Kaiming's for a ReLU, by the second side of its (r, in) and (out, r).
    a = jax.random.uniform(one, (inputs, config["r"]), jnp.float32, -1, 1) * math.sqrt(6 / inputs)
    b = jax.random.uniform(other, (config["r"], outputs), jnp.float32, -1, 1) * math.sqrt(6 / config["r"])
    return {**method.init(rng, params, axes), "vera_a": a, "vera_b": b}


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    _, stack, _, outputs = target.axes
    b, d = jnp.zeros((*stack, *outputs), jnp.float32), jnp.full((*stack, config["r"]), config["d_initial"], jnp.float32)
    if not config["init_weights"]:
        b, d = jnp.ones_like(b), jax.random.normal(key, d.shape, jnp.float32)
    return {"vera_lambda_b": b, "vera_lambda_d": d, "vera_on": kernel_adapter.switch(config, target)}


def _intercept(dropout: float, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y, module = next_fun(*args, **kwargs), context.module
    if (leaves := kernel_adapter.read(module, context, LEAVES, "VeRA")) is None:
        return y
    x = kernel_axes.inputs_last(module, args[0])
    x = kernel_adapter.dropped(module, context, x, dropout, "vera_dropout").astype(y.dtype)
    b, d, on = (leaf.astype(y.dtype) for leaf in leaves)
    inside = math.prod(module.get_variable("params", "kernel").shape) // b.size
    low = keep(x.reshape(-1, inside) @ context.params["vera_a"][:inside].astype(y.dtype))
    change = (low * (d * on)) @ context.params["vera_b"][:, :b.size].astype(y.dtype)
    return y + (change * b.reshape(-1)).reshape(y.shape)


def _merge(params: Mapping[str, Any]) -> tree.Tree:
    """Add the update A d B b to each kernel, in float32, back to the kernel's dtype; the leaves are gone afterwards."""
    check_leaves(LEAVES, params, "VERA")
    shared = {name: params[name] for name in SHARED}
    rest = {path: leaf for path, leaf in params.items() if path not in SHARED}
    return kernel_adapter.merge(rest, LEAVES, partial(_folded, *shared.values()))


def _folded(a: jax.Array, b: jax.Array, kernel: jax.Array, scale_b: jax.Array, scale_d: jax.Array, on: jax.Array,
            ) -> jax.Array:
    stack, width = on.shape, math.prod(scale_b.shape[on.ndim:])
    inside = kernel.size // (on.size * width)
    low = a[:inside] * (scale_d * on[..., None])[..., None, :]
    change = jnp.matmul(low, b[:, :width], precision="highest") * scale_b.reshape(*stack, 1, width)
    return kernel + change.reshape(kernel.shape)


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    return {**adapter_file.fields(config, flat, naming), "save_projection": True, "fan_in_fan_out": False}


def _read(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not stated.get("save_projection", True):
        raise PeftJaxError(f"{where} has save_projection=False: its projections are torch's random numbers, which only "
                           "torch can draw again; save it from peft with save_projection=True.")
    return {name: value for name, value in stated.items() if name != "save_projection"}


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    return {**VECTORS_ALONE.slots(config, flat, trained, naming),
            **{key: Slot(path, np.transpose) for path, key in SHARED.items()}}


VECTORS_ALONE = adapter_file.stored(
    vera, "VERA", "vera_on", {name: (name, np.ravel) for name in VECTORS}, fields=_fields, read=_read,
    arguments=(*arguments_of(vera), "save_projection"), silent=("fan_in_fan_out",))
FORMAT = VECTORS_ALONE._replace(slots=_slots)
SHOWN = {"step": {"r": 64}}  # in tables and benchmarks
