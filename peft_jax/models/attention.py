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
        if self.implementation not in IMPLEMENTATIONS:
            raise PeftJaxError(f"attn_implementation={self.implementation!r}: "
                               f"{nearest(str(self.implementation), IMPLEMENTATIONS)}")
        chosen = self.implementation
        if chosen == "auto":
            chosen = "cudnn" if flash_fits(query, key) else "xla"
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=chosen)


def flash_fits(query: Any, key: Any, device: Any = None) -> bool:
    """Whether cuDNN's flash attention takes these arrays, or shapes, on ``device``, by default the first one there is.

    It wants an NVIDIA GPU from Ampere on, 16-bit floats, heads of a multiple of 8 and at most 128 values, and, with a
    mask in training, even numbers of queries and keys. One query alone, as in decoding, gains nothing by it.
    """
    device = jax.devices()[0] if device is None else device
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability is None or "." not in str(capability) or float(capability) < AMPERE:
        return False  # AMD's say "gfx90a"
    (queries, size), keys = (query.shape[1], query.shape[3]), key.shape[1]
    return (query.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= HEAD_MOST and queries > 1 and
            queries % 2 == 0 and keys % 2 == 0)
