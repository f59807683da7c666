"""OFT, orthogonal fine-tuning: the input of a module is rotated, block by block (arXiv 2306.07280; 2506.19847).

    y = (x R) W + b        R = diag(R_1, ..., R_blocks),  Q_i = -Q_i' the skew-symmetric matrix of one block

    exactly (Cayley):      R_i = (I - Q_i) (I + Q_i)^-1
    approximately:         R_i = I + 2 Q_i + 2 Q_i^2 + ... + Q_i^n, a Neumann series of (I + Q_i) (I - Q_i)^-1

Both as Hugging Face peft 0.21 has them: they turn opposite ways. Beside each adapted ``kernel`` stand ``oft_r``
(*stack, blocks, block_size (block_size - 1) / 2), the upper triangles of the Q_i row by row, and the frozen switch
``oft_on`` (*stack), zero for layers of a stack that are not adapted. Q starts at zero, so that training starts from the
base model; what is added to x is x (R - I), which is then zero.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core import kernel_axes, validation
from peft_jax.core.peft_format import Naming
from peft_jax.core.targeting import Patterns, Target
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter

LEAVES = ("oft_r", "oft_on")
BIASES = ("none", "all", "oft_only")


def oft(r: int = 0, oft_block_size: int = 32, module_dropout: float = 0.0,
        target_modules: Patterns = ("q_proj", "v_proj"), *, bias: str = "none", coft: bool = False, eps: float = 6e-5,
        block_share: bool = False, use_cayley_neumann: bool = True, num_cayley_neumann_terms: int = 5,
        exclude_modules: Patterns = None, layers_to_transform: int | tuple[int, ...] | None = None,
        layers_pattern: Patterns = None, modules_to_save: tuple[str, ...] | None = None,
        init_weights: bool = True) -> Method:
    """OFT with the arguments, meanings and defaults of Hugging Face peft's ``OFTConfig``, linear modules only.

    Args:
      r: number of blocks; oft_block_size: inputs in a block. One of them is 0 and follows from the other. Where it
        does not divide a module's inputs, that module takes the nearest number that does, the smaller of two, as in
        peft.
      module_dropout: the part of a module's blocks that is left unrotated, other ones in each call; needs
        ``rngs={"dropout": key}``. (peft 0.21 accepts the argument and drops nothing.)
      bias: which biases train: "none", "all", "oft_only" (of adapted modules).
      coft, eps: constrained OFT: each Q_i is scaled back to a norm of eps / sqrt(blocks) where it is longer. The
        gradient passes as if it were not.
      block_share: one block's Q for all blocks of a module.
      use_cayley_neumann: the series instead of the inverse; num_cayley_neumann_terms: its terms, I included (3 is 4).
      init_weights: False starts from normal random numbers of deviation 0.1 (not the base model; for tests).
      The others as of :func:`peft_jax.lora`.

    Returns a :class:`Method`; its leaves are float32 and so are the rotations.

    >>> method = oft(oft_block_size=3, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items()}
    {'kernel': (6, 8), 'oft_r': (2, 3), 'oft_on': ()}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing.
    """
    config = kernel_adapter.tidy(
        peft_type="OFT", r=r, oft_block_size=oft_block_size, module_dropout=module_dropout,
        target_modules=target_modules, bias=bias, coft=coft, eps=eps, block_share=block_share,
        use_cayley_neumann=use_cayley_neumann, num_cayley_neumann_terms=num_cayley_neumann_terms,
        exclude_modules=exclude_modules, layers_to_transform=layers_to_transform, layers_pattern=layers_pattern,
        modules_to_save=modules_to_save, init_weights=init_weights)
    _check(config)
    return kernel_adapter.method(config, trained=LEAVES[:1], switch="oft_on", leaves=_leaves,
                                 intercept=partial(_intercept, config), fold=partial(_fold, config), stored=FORMAT)


def _check(config: Mapping[str, Any]) -> None:
    r, size = config["r"], config["oft_block_size"]
    if not all(isinstance(number, int) and number >= 0 for number in (r, size)) or bool(r) == bool(size):
        raise PeftJaxError(f"r={r!r} and oft_block_size={size!r}: give one of them, a whole number, and 0 for the "
                           "other; their product is the number of a module's inputs.")
    validation.check_probability("module_dropout", config["module_dropout"])
    validation.check_number("eps", config["eps"])
    validation.check_choice("bias", config["bias"], BIASES)
    validation.check_switches(config, "init_weights", "coft", "block_share", "use_cayley_neumann")
    validation.check_whole("num_cayley_neumann_terms", config["num_cayley_neumann_terms"])


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    _, stack, inputs, outputs = target.axes
    width, blocks = math.prod(inputs), config["r"]
    size = width // nearest_divisor(width, blocks) if blocks else nearest_divisor(width, config["oft_block_size"])
    if size < 2:
        raise PeftJaxError(f"'{target.path}' has {width} inputs: in blocks of one nothing can be rotated.")
    if config["block_share"] and len(inputs) + len(outputs) > 2:
        raise PeftJaxError(f"block_share=True needs kernels of one input and one output axis; '{target.path}' has "
                           f"{inputs} and {outputs}: set block_share=False.")
    shape = (*stack, 1 if config["block_share"] else width // size, size * (size - 1) // 2)
    on = kernel_adapter.switch(config, target)
    start = jnp.zeros(shape, jnp.float32)
    if not config["init_weights"]:
        start = 0.1 * jax.random.normal(key, shape, jnp.float32) * on[..., None, None]
    return {"oft_r": start, "oft_on": on}


def nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of ``width`` nearest to ``wanted``, the smaller of two.

    >>> nearest_divisor(576, 32), nearest_divisor(576, 30), nearest_divisor(24, 7)
    (32, 32, 6)
    """
    return min((abs(wanted - d), d) for d in range(1, width + 1) if width % d == 0)[1]


def _intercept(config: Mapping[str, Any], next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any,
               ) -> Any:
    module = context.module
    if (leaves := kernel_adapter.read(module, context, LEAVES, "OFT")) is None:
        return next_fun(*args, **kwargs)
    x = kernel_axes.inputs_last(module, args[0])
    count = len(kernel_axes.input_axes(module, x.ndim))
    turns = excess(config, *leaves)
    blocks = x.reshape(-1, math.prod(x.shape[x.ndim - count:]) // turns.shape[-1], turns.shape[-1])
    turns = _dropped(module, context, jnp.broadcast_to(turns, (blocks.shape[1], *turns.shape[1:])), config)
    moved = x + jnp.einsum("tbi,bij->tbj", blocks, turns.astype(x.dtype)).reshape(x.shape)
    return next_fun(kernel_axes.inputs_back(module, moved), *args[1:], **kwargs)


def excess(config: Mapping[str, Any], upper: jax.Array, on: jax.Array) -> jax.Array:
    """R - I of each block, float32 (..., blocks, size, size), from the upper triangles of its Q."""
    q = skew(_constrained(config, upper) * on[..., None, None])
    if not config["use_cayley_neumann"]:  # (I - Q) (I + Q)^-1 - I = -2 Q (I + Q)^-1, and transposed of a skew Q
        eye = jnp.eye(q.shape[-1], dtype=q.dtype)
        return jnp.swapaxes(jnp.linalg.solve(eye - q, 2 * q), -1, -2)
    terms, power = config["num_cayley_neumann_terms"], q
    total = 2 * q if terms > 1 else jnp.zeros_like(q)
    for _ in range(max(terms - 3, terms > 2)):
        power = jnp.matmul(power, q, precision="highest")
        total = total + 2 * power
    return total + jnp.matmul(power, q, precision="highest") if terms > 2 else total


def skew(upper: jax.Array) -> jax.Array:
    """The skew-symmetric matrices (..., size, size) of upper triangles (..., size (size - 1) / 2), row by row."""
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2
    rows, columns = np.triu_indices(size, 1)
    half = jnp.zeros((*upper.shape[:-1], size, size), upper.dtype).at[..., rows, columns].set(upper)
    return half - jnp.swapaxes(half, -1, -2)


def _constrained(config: Mapping[str, Any], upper: jax.Array) -> jax.Array:
    """Triangles of which each Q has a norm of at most eps / sqrt(blocks), in constrained OFT."""
    if not config["coft"]:
        return upper
    limit = config["eps"] / math.sqrt(upper.shape[-2])
    norm = jnp.sqrt(2 * jnp.sum(jnp.square(upper), -1, keepdims=True))  # each element stands in Q twice
    short = upper * jnp.minimum(1, limit / jnp.where(norm > 0, norm, limit))
    return upper + jax.lax.stop_gradient(short - upper)


def _dropped(module: Any, context: Any, turns: jax.Array, config: Mapping[str, Any]) -> jax.Array:
    """Some blocks unrotated, where there are several and the call was given a ``dropout`` stream."""
    rate, blocks = config["module_dropout"], turns.shape[0]
    if not rate or blocks == 1 or config["block_share"]:
        return turns
    key = kernel_adapter.dropout_key(module, context, f"module_dropout={rate}")
    if key is None:
        return turns
    stays = jax.random.permutation(key, np.arange(blocks) >= int(rate * blocks))
    return jnp.where(stays[:, None, None], turns, 0)


def _fold(config: Mapping[str, Any], kernel: jax.Array, upper: jax.Array, on: jax.Array) -> jax.Array:
    """The kernel with its inputs rotated."""
    turns = excess(config, upper, on)
    inputs = kernel.shape[on.ndim] if config["block_share"] else math.prod(turns.shape[-3:-1])
    rows = kernel.reshape(*on.shape, inputs // turns.shape[-1], turns.shape[-1], -1)
    return kernel + jnp.matmul(turns, rows, precision="highest").reshape(kernel.shape)


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    return {**adapter_file.fields(config, flat, naming), "fan_in_fan_out": False}


FORMAT = adapter_file.stored(oft, "OFT", "oft_on", {"oft_r": ("oft_R.weight", lambda upper: upper)}, fields=_fields,
                             silent=("fan_in_fan_out",))
