"""bitsandbytes on the CPU, on numpy arrays, and its bytes as our leaf."""

import jax.numpy as jnp
import numpy as np
import torch
from bitsandbytes import functional as bnb

from peft_jax import QuantizedArray


def quantize(matrix, quant_type, block_size, double_quant=False, dtype="float32"):
    """(packed codes (n,), their QuantState) of a matrix (rows, columns).

    Flattened first: the codes are the same, but on a matrix whose columns are not whole blocks bitsandbytes 0.50's CPU
    kernel decodes rows after the first with another block's scale (64x96 at block 64: errors up to four times ours).
    """
    torch.set_num_threads(1)
    given = torch.tensor(matrix).to(getattr(torch, dtype)).reshape(-1)
    packed, state = bnb.quantize_4bit(given, blocksize=block_size, quant_type=quant_type,
                                      compress_statistics=double_quant)
    return packed, state


def dequantize(packed, state, shape):
    """float32 ``shape``; from bfloat16 that is exact."""
    with torch.compiler.set_stance("force_eager"):  # it would compile one program for each shape
        return bnb.dequantize_4bit(packed, state).float().numpy().reshape(shape)


def as_leaf(packed, state, like: QuantizedArray) -> QuantizedArray:
    """Their bytes in our leaf, which takes the shapes of ``like``."""
    nested = state.state2 and jnp.asarray(state.state2.absmax.numpy())
    mean = state.offset if state.offset is None else jnp.asarray(state.offset.numpy())
    return QuantizedArray(
        jnp.asarray(packed.numpy()).reshape(like.codes.shape), jnp.asarray(state.absmax.numpy()).reshape(
            like.scales.shape), nested, mean, quant_type=state.quant_type, block_size=state.blocksize,
        inputs=like.inputs, outputs=like.outputs, by_rows=like.by_rows, plain_dtype=like.plain_dtype)  # fmt: skip


def bits(array):
    """Floats as integers, so that equality is of bits."""
    return np.asarray(array, np.float32).view(np.int32)
