"""MiSS, matrix shard sharing: all shards of a module's inputs share one small matrix (arXiv 2409.15371, section 3).

    y = x W + b + (x_1 + x_2 + ...) D        x_i the shards of r inputs that x is cut into, the last filled with zeros

Beside each adapted ``kernel`` stand ``miss_block``, D (*stack, r, *out), zero at the start (with "mini" of mini_r
columns, which D repeats), and the frozen switch ``miss_on`` (*stack), zero for layers of a stack that are not adapted.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import kernel_axes, validation
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter


def miss(r: int = 64, target_modules: Patterns = ("q_proj", "v_proj"), miss_dropout: float = 0.0, *, mini_r: int = 1,
         bias: str = "none", exclude_modules: Patterns = None, layers_pattern: Patterns = None,
         layers_to_transform: int | tuple[int, ...] | None = None, modules_to_save: tuple[str, ...] | None = None,
         init_weights: bool | str = True) -> Method:
    """MiSS with the arguments, meanings and defaults of Hugging Face peft's ``MissConfig``.

    Args:
      r: inputs of a shard. mini_r: columns of the leaf with "mini", a divisor of the outputs. bias: "MiSS_only" too.
      init_weights: True, "mini", or False for a random D (for tests); not peft's "bat", whose update depends on W.
      The others as of :func:`peft_jax.lora`. Raises ``PeftJaxError`` for values out of range."""
    config = kernel_adapter.tidy(
        peft_type="MISS", r=r, target_modules=target_modules, miss_dropout=miss_dropout, mini_r=mini_r, bias=bias,
        exclude_modules=exclude_modules, layers_pattern=layers_pattern, layers_to_transform=layers_to_transform,
        modules_to_save=modules_to_save, init_weights=init_weights)
    for name in ("r", "mini_r"):
        validation.check_rank(name, config[name])
    validation.check_probability("miss_dropout", miss_dropout)
    validation.check_choice("bias", bias, ("none", "all", "MiSS_only"))
    validation.check_choice("init_weights", init_weights, (True, False, "mini"))
    return kernel_adapter.method(
        config, trained=("miss_block",), switch="miss_on", leaves=_leaves, intercept=partial(_intercept, config),
        fold=partial(_fold, config), stored=FORMAT, along={"miss_block": (None, "outputs")})


def _leaves(config: dict[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    (_, stack, inputs, outputs), r, mini_r = target.axes, config["r"], config["mini_r"]
    shape = (*stack, r, mini_r) if (mini := config["init_weights"] == "mini") else (*stack, r, *outputs)
    if r > prod(inputs) or (mini and (len(outputs) > 1 or prod(outputs) % mini_r)):
        raise PeftJaxError(f"'{target.path}' has inputs {inputs} and outputs {outputs}: r={r} can be at most the "
                           f"inputs{f', and mini_r={mini_r} must divide outputs of one axis' if mini else ''}.")
    block = jnp.zeros(shape) if config["init_weights"] else jax.random.uniform(key, shape, minval=-1) * 0.1
    return {"miss_block": block, "miss_on": kernel_adapter.switch(config, target)}


def _intercept(config: dict[str, Any], next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    y, module = next_fun(*args, **kwargs), context.module
    if (leaves := kernel_adapter.read(module, context, ("miss_block", "miss_on"), "MiSS")) is None:
        return y
    wide = _wide(config, kernel := module.get_variable("params", "kernel"), *leaves).astype(y.dtype)
    x = kernel_axes.inputs_last(module, args[0]).reshape(-1, prod(kernel.shape) // wide.shape[-1])
    x = kernel_adapter.dropped(module, context, x, config["miss_dropout"], "miss_dropout").astype(y.dtype)
    shards = jnp.pad(x, ((0, 0), (0, -x.shape[1] % len(wide)))).reshape(len(x), -(-x.shape[1] // len(wide)), len(wide))
    return y + (shards.sum(1) @ wide).reshape(y.shape)


def _wide(config: dict[str, Any], kernel: Any, block: jax.Array, on: jax.Array) -> jax.Array:
    rows = block.reshape(*on.shape, config["r"], -1) * on[..., None, None]
    return jnp.tile(rows, kernel.shape[-1] // config["mini_r"]) if config["init_weights"] == "mini" else rows


def _fold(config: dict[str, Any], kernel: jax.Array, block: jax.Array, on: jax.Array) -> jax.Array:
    wide = _wide(config, kernel, block, on)
    shard = jnp.arange(kernel.size // wide[..., 0, :].size) % config["r"]  # row i of the kernel gets row i mod r of D
    return kernel + wide[..., shard, :].reshape(kernel.shape)


FORMAT = adapter_file.stored(miss, "MISS", "miss_on", {"miss_block": ("miss_block", lambda d: d.reshape(len(d), -1))})
