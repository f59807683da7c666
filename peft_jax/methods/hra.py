"""HRA, Householder reflection adaptation: the input of a module is reflected r times (arXiv 2405.17484, eq. 3).

    y = (x H_r ... H_1) W + b        H_i = I - 2 u_i u_i'        each u_i scaled to length one

The product of reflections is I - U T' U' with U = [u_1 ... u_r] and a small upper triangle T, T^-1 = I / 2 + the part
of U' U above its diagonal (the compact WY form), so that x is read once and not r times. With ``apply_GS`` the columns
are made orthonormal, Q, as by a Gram-Schmidt process, and the product is I - 2 Q Q'.

Beside each adapted ``kernel`` stand ``hra_u`` (*stack, *in, r) and the frozen switch ``hra_on`` (*stack), zero for
layers of a stack that are not adapted. Columns start in equal pairs, whose reflections cancel but for rounding.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import kernel_axes, validation
from peft_jax.core.remat import keep
from peft_jax.core.targeting import Patterns, Target
from peft_jax.method import Method
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter

LEAVES = ("hra_u", "hra_on")
BIASES = ("none", "all", "hra_only")


def hra(r: int = 8, apply_GS: bool = False, target_modules: Patterns = ("q_proj", "v_proj"), *, bias: str = "none",
        exclude_modules: Patterns = None, layers_to_transform: int | tuple[int, ...] | None = None,
        layers_pattern: Patterns = None, modules_to_save: tuple[str, ...] | None = None,
        init_weights: bool = True) -> Method:
    """HRA with the arguments, meanings and defaults of Hugging Face peft's ``HRAConfig``, linear modules only.

    Args:
      r: number of reflections. An odd number does not start in pairs: training does not start from the base model.
      apply_GS: make the columns orthonormal. Reflections in orthogonal directions cannot cancel, so training does not
        start from the base model either; all columns then start at random.
      bias: which biases train: "none", "all", "hra_only" (of adapted modules).
      init_weights: False starts all columns at random (for tests).
      The others as of :func:`peft_jax.lora`.

    Returns a :class:`Method`; its leaves are float32.

    >>> method = hra(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items()}
    {'kernel': (6, 8), 'hra_u': (6, 4), 'hra_on': ()}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing.
    """
    config = kernel_adapter.tidy(
        peft_type="HRA", r=r, apply_GS=apply_GS, target_modules=target_modules, bias=bias,
        exclude_modules=exclude_modules, layers_to_transform=layers_to_transform, layers_pattern=layers_pattern,
        modules_to_save=modules_to_save, init_weights=init_weights)
    validation.check_rank("r", r)
    validation.check_switches(config, "apply_GS", "init_weights")
    validation.check_choice("bias", bias, BIASES)
    return kernel_adapter.method(
        config, trained=LEAVES[:1], switch="hra_on", leaves=_leaves, intercept=partial(_intercept, apply_GS),
        fold=partial(_fold, apply_GS), stored=FORMAT, along={"hra_u": ("inputs", None)})


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    _, stack, inputs, _ = target.axes
    r, paired = config["r"], config["init_weights"] and not config["apply_GS"] and config["r"] % 2 == 0
    random = jax.random.uniform(key, (*stack, *inputs, r // 2 if paired else r), jnp.float32, -1, 1)
    u = jnp.repeat(random, 2, -1) if paired else random
    on = kernel_adapter.switch(config, target)
    u = u / math.sqrt(random.shape[-1]) * on.reshape(*stack, *[1] * (u.ndim - len(stack)))
    return {"hra_u": u, "hra_on": on}


def _intercept(orthogonal: bool, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    if (leaves := kernel_adapter.read(module, context, LEAVES, "HRA")) is None:
        return next_fun(*args, **kwargs)
    x = kernel_axes.inputs_last(module, args[0])
    left, right = (side.astype(x.dtype) for side in sides(leaves[0], leaves[1], orthogonal))
    low = keep(x.reshape(-1, left.shape[0]) @ left)
    moved = x - (low @ right.T).reshape(x.shape)
    return next_fun(kernel_axes.inputs_back(module, moved), *args[1:], **kwargs)


def sides(u: jax.Array, on: jax.Array, orthogonal: bool) -> tuple[jax.Array, jax.Array]:
    """Float32 matrices (*stack, in, r), left and right, with I - left right' the product that x is multiplied by."""
    r, switch = u.shape[-1], on[..., None, None] > 0
    u = u.reshape(*on.shape, -1, r)
    if orthogonal:
        q, _ = jnp.linalg.qr(jnp.where(switch, u, jnp.eye(*u.shape[-2:], dtype=u.dtype)))
        return jnp.where(switch, 2 * q, 0), q
    u = jnp.where(switch, u, 1)  # a column without a length has no direction
    u = u / jnp.linalg.norm(u, axis=-2, keepdims=True)
    gram = jnp.einsum("...ni,...nj->...ij", u, u, precision="highest")
    inverse = jnp.triu(gram, 1) + jnp.eye(r, dtype=u.dtype) / 2
    right = jax.lax.linalg.triangular_solve(inverse, u, left_side=False)
    return jnp.where(switch, u, 0), right


def _fold(orthogonal: bool, kernel: jax.Array, u: jax.Array, on: jax.Array) -> jax.Array:
    """The kernel with its inputs reflected."""
    left, right = sides(u, on, orthogonal)
    rows = kernel.reshape(*left.shape[:-1], -1)
    low = jnp.einsum("...nr,...no->...ro", right, rows, precision="highest")
    return kernel - jnp.matmul(left, low, precision="highest").reshape(kernel.shape)


FORMAT = adapter_file.stored(hra, "HRA", "hra_on", {"hra_u": ("hra_u", lambda u: u.reshape(-1, u.shape[-1]))})
