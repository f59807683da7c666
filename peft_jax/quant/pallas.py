"""Products with a quantised weight in one Pallas kernel: its tiles are decoded beside the matrix unit.

The plain product writes the decoded weight to memory and reads it again; a kernel reads the codes alone. There is one
for TPUs and one for Hopper GPUs; on other platforms, and for what they do not take, the product is the plain one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.quant import pallas_gpu, pallas_tpu
from peft_jax.quant.qarray import QuantizedArray

BLOCKS = (32, 64, 128)
DTYPES = ("bfloat16", "float32")


def unfit(leaf: QuantizedArray, dtype: Any) -> str | None:
    """Why no kernel multiplies activations of a dtype with a leaf, in words; ``None`` where one does.

    Where there is a reason the plain product is used. A platform may have reasons of its own: see :func:`why_plain`.

    >>> from peft_jax import quantize_array
    >>> unfit(quantize_array(jnp.ones((64, 32)), block_size=16), jnp.float32)
    'its blocks are of 16 values, not of 32, 64, 128'
    """
    if len(leaf.stack):
        return "it is a stack of weights"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"activations are {jnp.dtype(dtype).name}, not {' or '.join(DTYPES)}"
    if leaf.block_size not in BLOCKS:
        blocks = f"of {leaf.block_size} values" if leaf.block_size else "whole rows"
        return f"its blocks are {blocks}, not of {', '.join(map(str, BLOCKS))}"
    if leaf.flat or leaf.matrix[0] == 1:
        return "it is one row, or its rows are no whole number of blocks"
    return None


def why_plain(leaf: QuantizedArray, dtype: Any, platform: str | None = None) -> str | None:
    """Why a platform, jax's by default, multiplies with a leaf by the plain product, in words; ``None``: by a kernel.

    >>> from peft_jax import quantize_array
    >>> why_plain(quantize_array(jnp.ones((64, 32))), jnp.float32, platform="cpu")
    'there is no kernel for cpu'
    """
    if why := unfit(leaf, dtype):
        return why
    platform = platform or jax.default_backend()
    if platform == "gpu":
        return pallas_gpu.unfit(leaf, dtype)
    if platform == "tpu":
        return None if pallas_tpu.tiles_of(leaf, 1) else f"no tile divides its {leaf.matrix[0]} x {leaf.matrix[1]}"
    return f"there is no kernel for {platform}"


def multiply(x: jax.Array, leaf: QuantizedArray, over_columns: bool, plain: Callable) -> jax.Array:
    """x (T, C) times the transposed matrix (R, C) that a leaf holds, or x (T, R) times the matrix: (T, R) or (T, C).

    By the kernel of the platform that a program is lowered for, where it fits the leaf and x's dtype; else
    ``plain(x, leaf)``. A leaf whose ``product`` is "interpreted" takes the TPU's to Pallas' interpreter.
    """
    if not len(x) or unfit(leaf, x.dtype):
        return plain(x, leaf)
    tiles, interpret = pallas_tpu.tiles_of(leaf, len(x)), leaf.product == "interpreted"
    tpu = partial(pallas_tpu.times, over_columns=over_columns, tiles=tiles, interpret=interpret) if tiles else plain
    if interpret:
        return tpu(x, leaf)
    gpu = plain if pallas_gpu.unfit(leaf, x.dtype) else partial(pallas_gpu.times, over_columns=over_columns)
    return jax.lax.platform_dependent(x, leaf, cuda=gpu, tpu=tpu, default=plain)
