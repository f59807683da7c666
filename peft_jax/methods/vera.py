"""VeRA, vectors between random projections that all modules share (arXiv 2310.11454, eq. 2).

    y = x W + (drop(x) A * d) B * b

A (in, r) and B (r, out) are random, frozen and one pair for the whole model: the root leaves ``vera_a`` (largest in, r)
and ``vera_b`` (r, largest out), of which each module takes its corner. Beside each adapted ``kernel`` stand the trained
vectors ``vera_lambda_d`` (*stack, r) and ``vera_lambda_b`` (*stack, *out), and the frozen switch ``vera_on`` (*stack),
zero for layers of a stack that are not adapted. b starts at zero, so that training starts from the base model.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import kernel_axes, validation
from peft_jax.core.peft_format import Format, Slot
from peft_jax.core.remat import keep
from peft_jax.core.targeting import Patterns
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method, check_leaves
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _biases as biases
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
    config = kernel_adapter.tidy({"peft_type": "VERA", "exclude_modules": None, **locals()})
    validation.check_rank("r", r)
    validation.check_probability("vera_dropout", vera_dropout)
    validation.check_number("d_initial", d_initial)
    validation.check_choice("bias", bias, BIASES)
    validation.check_switches(config, "init_weights")
    if not isinstance(projection_prng_key, int):
        raise PeftJaxError(f"projection_prng_key={projection_prng_key!r}: a seed is a whole number.")
    trains = partial(biases.trains, config, VECTORS, "vera_on")
    padding = partial(kernel_adapter.padding, config=config, leaves=VECTORS, switch="vera_on")
    return Method(partial(_init, config, trains), partial(_intercept, vera_dropout),
                  partial(kernel_adapter.labels, trained=trains), _merge, config, padding, FORMAT,
                  leaves=(*LEAVES, *SHARED))


def _init(config, trains, rng, params, axes=None):
    sizes = []
    params = biases.init(config, partial(_leaves, config, sizes), trains, "vera_on", rng, params, axes)
    inputs, outputs = (max(side) for side in zip(*sizes))
    one, other = jax.random.split(jax.random.key(config["projection_prng_key"]))
    # peft's bound: Kaiming's for a ReLU, by the second side of its (r, in) and (out, r).
    a = jax.random.uniform(one, (inputs, config["r"]), jnp.float32, -1, 1) * math.sqrt(6 / inputs)
    b = jax.random.uniform(other, (config["r"], outputs), jnp.float32, -1, 1) * math.sqrt(6 / config["r"])
    return {**params, "vera_a": a, "vera_b": b}


def _leaves(config, sizes, key, target, kernel) -> dict[str, jax.Array]:
    """The leaves of one target; its (in, out) is noted in ``sizes``."""
    _, stack, inputs, outputs = target.axes
    sizes.append((math.prod(inputs), math.prod(outputs)))
    b, d = jnp.zeros((*stack, *outputs), jnp.float32), jnp.full((*stack, config["r"]), config["d_initial"], jnp.float32)
    if not config["init_weights"]:
        b, d = jnp.ones_like(b), jax.random.normal(key, d.shape, jnp.float32)
    return {"vera_lambda_b": b, "vera_lambda_d": d, "vera_on": kernel_adapter.switch(config, target)}


def _intercept(dropout, next_fun, args, kwargs, context):
    y, module = next_fun(*args, **kwargs), context.module
    if (held := kernel_adapter.read(module, context, LEAVES, "VeRA")) is None:
        return y
    x = kernel_axes.inputs_last(module, args[0])
    x = kernel_adapter.dropped(module, context, x, dropout, "vera_dropout").astype(y.dtype)
    b, d, on = (leaf.astype(y.dtype) for leaf in held)
    inside = math.prod(module.get_variable("params", "kernel").shape) // b.size
    low = keep(x.reshape(-1, inside) @ context.params["vera_a"][:inside].astype(y.dtype))
    change = (low * (d * on)) @ context.params["vera_b"][:, :b.size].astype(y.dtype)
    return y + (change * b.reshape(-1)).reshape(y.shape)


def _merge(params):
    """Add the update A d B b to each kernel, in float32, back to the kernel's dtype; the leaves are gone afterwards."""
    check_leaves(LEAVES, params, "VERA")
    shared = {name: params[name] for name in SHARED}
    rest = {path: leaf for path, leaf in params.items() if path not in SHARED}
    return kernel_adapter.merge(rest, LEAVES, partial(_folded, *shared.values()))


def _folded(a, b, kernel, scale_b, scale_d, on):
    stack, width = on.shape, math.prod(scale_b.shape[on.ndim:])
    inside = kernel.size // (on.size * width)
    low = a[:inside] * (scale_d * on[..., None])[..., None, :]
    change = jnp.matmul(low, b[:, :width], precision="highest") * scale_b.reshape(*stack, 1, width)
    return kernel + change.reshape(kernel.shape)


def _slots(config, flat, trained, naming):
    def view(leaf, name):
        return np.ravel if kernel_adapter.chosen(config, [name])[0] else None

    keys = {name: name for name in VECTORS}
    return {**adapter_file.slots(flat, trained, naming, "vera_on", keys, view),
            **{key: Slot(path, np.transpose) for path, key in SHARED.items()}}


def _fields(config, flat, naming):
    return {**adapter_file.fields(config, flat, naming), "save_projection": True, "fan_in_fan_out": False}


def _read(stated, where):
    if not stated.get("save_projection", True):
        raise PeftJaxError(f"{where} has save_projection=False: its projections are torch's random numbers, which only "
                           "torch can draw again; save it from peft with save_projection=True.")
    return {name: value for name, value in stated.items() if name != "save_projection"}


ARGUMENTS = ("r", "target_modules", "vera_dropout", "d_initial", "projection_prng_key", "bias", "layers_to_transform",
             "layers_pattern", "modules_to_save", "init_weights", "save_projection")
FORMAT = Format("VERA", vera, ARGUMENTS, _slots, _fields, ("fan_in_fan_out",), _read)
