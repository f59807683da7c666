"""Softmax attention, and which program computes it. B batch, T query tokens, S key slots, N heads, H head size."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from peft_jax.errors import PeftJaxError, nearest

IMPLEMENTATIONS = ("auto", "xla", "cudnn")
HEAD_MOST = 128  # values of a head that cuDNN's kernels take on every card from Ampere on
AMPERE = 8.0  # compute capability


class AttentionCore(nn.Module):
    """Softmax attention without parameters: the place where a method adds keys and values.

    ``implementation`` is one of ``IMPLEMENTATIONS``: "cudnn" is flash attention on NVIDIA GPUs, which never holds the
    (B, N, T, S) probabilities (arXiv:2205.14135); "auto" is that where :func:`flash_fits`, else "xla".
    """

    implementation: str = "auto"

    @nn.compact
    def __call__(self, query, key, value, mask):
        """(B, T, N, H), two (B, S, K, H) and a boolean mask (B, 1, T, S) -> (B, T, N, H)."""
        chosen = _checked(self.implementation)
        if chosen == "auto":
            chosen = "cudnn" if flash_fits(query, key) else "xla"
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=chosen)  # pyright: ignore


def flash_fits(query: Any, key: Any, device: Any = None) -> bool:
    """Whether cuDNN's flash attention takes these arrays, or shapes, on ``device``, by default the first one there is.

    It wants an NVIDIA GPU from Ampere on, 16-bit floats, heads of a multiple of 8 and at most 128 values, and, with a
    mask in training, even numbers of queries and keys. One query alone, as in decoding, gains nothing by it.
    """
    (queries, keys) = query.shape[1], key.shape[1]
    return not flash_lacks(query, device) and queries > 1 and queries % 2 == 0 and keys % 2 == 0


def flash_lacks(query: Any, device: Any = None) -> str:
    """What cuDNN's flash attention wants that ``query``, an array or a shape, or the device has not; "" if nothing."""
    device = jax.devices()[0] if device is None else device
    capability, size = str(getattr(device, "compute_capability", None)), query.shape[3]
    if device.platform != "gpu" or "." not in capability or float(capability) < AMPERE:  # AMD's say "gfx90a"
        return "an NVIDIA GPU from Ampere on"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"model.dtype=bfloat16, not {query.dtype}"
    return "" if size % 8 == 0 and size <= HEAD_MOST else f"heads of a multiple of 8 and at most {HEAD_MOST} values"


def check_device(config: Any, dtype: Any, device: Any = None) -> None:
    """Raise ``PeftJaxError`` where ``config`` asks for cuDNN and it cannot be had here, computing in ``dtype``.

    Not in :class:`AttentionCore`: a program may be compiled for a GPU that is not there.
    """
    size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    query = jax.ShapeDtypeStruct((1, 2, config.num_attention_heads, size), dtype)
    if config.attn_implementation == "cudnn" and (why := flash_lacks(query, device)):
        raise PeftJaxError(f"attn_implementation='cudnn' wants {why}: choose auto, which is cudnn where it can be.")


def on_heads(implementation: str, config: Any, parts: int) -> str:
    """``implementation`` for a model whose heads are cut over ``parts`` devices.

    jax cuts cuDNN's program between whole heads only, queries and keys alike: "auto" is "xla" where a device would not
    have as many of them as every other. Raises ``PeftJaxError`` for "cudnn" there, and for an unknown one.

    >>> from peft_jax.models import GPT2Config
    >>> on_heads("auto", GPT2Config(64, 48, 64, 2, 6, 32), 2), on_heads("auto", GPT2Config(64, 48, 64, 2, 6, 32), 4)
    ('auto', 'xla')
    """
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    if _checked(implementation) == "xla" or not any(count % parts for count in heads):
        return implementation
    if implementation == "cudnn":
        raise PeftJaxError(f"attn_implementation='cudnn' with mesh.tensor={parts}: the model's {heads[0]} heads, "
                           f"{heads[1]} of keys, cannot be shared evenly; choose a divisor of both, or auto.")
    return "xla"


def _checked(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise PeftJaxError(f"attn_implementation={implementation!r}: {nearest(str(implementation), IMPLEMENTATIONS)}")
    return implementation
