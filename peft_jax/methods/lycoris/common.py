"""What LoHa and LoKr share: LyCORIS's arguments (arXiv 2309.14859), factors with padded ranks, and its two dropouts.

A module's update is a function of small factors. Those named ``*_a`` are (*stack, r, out side), those named ``*_b``
(*stack, in side, r), all others have no rank axis; each is the transpose of peft's tensor. Beside them stands the
frozen scale alpha / r (*stack), zero for the layers of a stack that are not adapted. Layers with a smaller rank than
others of their stack are filled with zeros, which stay zero under any gradient step.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import targeting, tree, validation
from peft_jax.core.peft_format import Naming, Slot
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora import init as lora_init
from peft_jax.methods.lora import peft_file


def tidy(inits: Sequence[Any], **arguments: Any) -> dict[str, Any]:
    """The config of LyCORIS's ``arguments`` and ``peft_type``, checked; ``inits``: values that init_weights may have.

    Raises ``PeftJaxError`` for values out of range.
    """
    config = kernel_adapter.tidy(**arguments)
    validation.check_patterns(config, "r", "alpha")
    for name in ("rank_dropout", "module_dropout"):
        validation.check_probability(name, config[name])
    validation.check_choice("init_weights", config["init_weights"], inits)
    return config


def _as_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same ranks and scales in LoRA's words."""
    return {**config, "lora_alpha": config["alpha"], "use_rslora": False}


def ranks(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The rank of each module by its name, int (len(names),), 0 where it is not adapted."""
    return lora_init.ranks(config, names)


def scalings(config: Mapping[str, Any], target: targeting.Target) -> jax.Array:
    """alpha / r of each layer of a target, float32 (*stack)."""
    return jnp.asarray(lora_init.scalings(_as_lora(config), target.names).reshape(target.axes.stack))


def factor(key: jax.Array, shape: Sequence[int], fan_in: int, each: np.ndarray, name: str, zero: bool = False,
           ) -> jax.Array:
    """A factor (*stack, ...) of layers of rank ``each`` (*stack), uniform within 1/sqrt(fan_in), or ``zero``."""
    if zero:
        return jnp.zeros(shape, jnp.float32)
    random = jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(fan_in)
    rank = each.reshape(*each.shape, *[1] * (len(shape) - each.ndim))
    axis = {"_a": each.ndim, "_b": len(shape) - 1}.get(name[-2:])
    if axis is None:
        return jnp.where(rank > 0, random, 0)
    return jnp.where(np.arange(shape[axis]).reshape(-1, *[1] * (len(shape) - 1 - axis)) < rank, random, 0)


def thinned(module: Any, context: Any, y: jax.Array, config: Mapping[str, Any], scaled: bool) -> jax.Array:
    """The update's output (..., out) with LyCORIS's dropouts, where the call was given a ``dropout`` stream.

    ``rank_dropout`` is the probability that an output element of the update is off for the whole call, as in peft;
    ``scaled``: the others are then raised to keep their mean. ``module_dropout`` is that the whole update is off.
    """
    for rate, name, width in ((config["rank_dropout"], "rank_dropout", y.shape[-1:]),
                              (config["module_dropout"], "module_dropout", ())):
        key = kernel_adapter.dropout_key(module, context, f"{name}={rate}") if rate else None
        if key is not None:
            stays = jax.random.bernoulli(key, 1 - rate, width).astype(jnp.float32)
            if scaled and width:
                stays = stays / jnp.maximum(stays.mean(), 1 / stays.size)
            y = y * stays.astype(y.dtype)
    return y


def padding(params: Mapping[str, Any], config: Mapping[str, Any], leaves: Sequence[str], scaling: str) -> int:
    """Elements of ``leaves`` beyond each layer's own rank, and in layers that are not adapted."""
    flat, unused = tree.flatten(params), 0
    for folder in kernel_adapter.folders(flat, scaling):
        stack = flat[folder + scaling].shape
        each = ranks(config, targeting.module_names(folder.rstrip("/"), stack))
        for name in leaves:
            if (leaf := flat.get(folder + name)) is not None:
                axis = {"_a": len(stack), "_b": leaf.ndim - 1}.get(name[-2:])
                most, own = (1, each > 0) if axis is None else (leaf.shape[axis], each)
                unused += leaf.size // (most * len(each)) * int((most - own).sum())
    return unused


def slots(leaves: Sequence[str], scaling: str, config: Mapping[str, Any], flat: Mapping[str, Any],
          trained: Sequence[str], naming: Naming) -> dict[str, Slot]:
    """The tensors of the factors: transposed, cut to each layer's own rank."""

    def view(leaf: str, name: str) -> Callable | None:
        rank = int(ranks(config, [name])[0])
        if not rank:
            return None
        if leaf.endswith("_a"):
            return lambda a: a.reshape(a.shape[0], -1)[:rank].T
        if leaf.endswith("_b"):
            return lambda b: b.reshape(-1, b.shape[-1])[:, :rank].T
        return lambda whole: whole.T

    peft_file.check_scalings(_as_lora(config), flat, scaling, "alpha")
    return adapter_file.slots(flat, trained, naming, scaling, {name: name for name in leaves}, view)


def fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """What peft needs in other words than ours, as for LoRA."""
    return peft_file.fields(_as_lora(config), flat, naming)
