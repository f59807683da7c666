"""Softmax attention, and which program computes it. B batch, T query tokens, S key slots, N heads, H head size."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from peft_jax.errors import PeftJaxError
from peft_jax.models import masks, splash

HEAD_MOST = 128  # values of a head that cuDNN's kernels take on every card from Ampere on
AMPERE = 8.0  # compute capability


class AttentionCore(nn.Module):
    """Softmax attention without parameters: the place where a method adds keys and values.

    ``implementation`` is one of ``IMPLEMENTATIONS``. "cudnn" is flash attention (arXiv:2205.14135) on NVIDIA GPUs,
    "splash" on TPUs: neither holds the (B, N, T, S) probabilities, nor an array (B, 1, T, S) where a
    :class:`peft_jax.models.masks.RowMask` says who sees whom (cuDNN's: where rows are not packed). "auto" is what
    :func:`choice` says.
    """

    implementation: str = "auto"

    @nn.compact
    def __call__(self, query, key, value, mask):
        """(B, T, N, H), two (B, S, K, H) and a RowMask or a boolean array (B, 1, T, S) -> (B, T, N, H)."""
        chosen = _checked(self.implementation)
        chosen = choice(query, key, mask) if chosen == "auto" else chosen
        return PROGRAMS[chosen](query, key, value, mask)


def choice(query: Any, key: Any, mask: Any, device: Any = None) -> str:
    """The fastest program for these arrays, or shapes, on ``device``, by default the first one there is."""
    if flash_fits(query, key, device, dense=not _in_words(mask)):
        return "cudnn"
    return "xla" if splash.lacks(query, key, mask, device) else "splash"


def _in_words(mask: Any) -> bool:
    """Whether cuDNN needs no array for it."""
    return isinstance(mask, masks.RowMask) and not mask.packed


def _xla(query, key, value, mask):
    seen = masks.dense(mask, query.shape[:2])
    return jax.nn.dot_product_attention(query, key, value, mask=seen, implementation="xla")


def _cudnn(query, key, value, mask, program: Literal["xla", "cudnn"] = "cudnn"):
    if not _in_words(mask):
        seen = masks.dense(mask, query.shape[:2])
        return jax.nn.dot_product_attention(query, key, value, mask=seen, implementation=program)
    more, count = mask.keys - query.shape[1], query.shape[1]
    first = more if mask.causal else 0  # cuDNN's first query stands at the first key
    # Lengths where all is real, too: without any its backward pass has given NaN for some numbers of tokens
    # (github.com/NVIDIA/cudnn-frontend/issues/160).
    keys = jnp.full(len(query), mask.keys) if mask.lengths is None else mask.lengths
    queries = keys - more + first
    query, key, value = _even(query, first), _even(key), _even(value)

    def attend(window):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=mask.causal, query_seq_lengths=queries.astype(jnp.int32),
            key_value_seq_lengths=keys.astype(jnp.int32), implementation=program,
            local_window_size=None if window is None else (window - 1, 0))

    return masks.by_window(mask, attend)[:, first:first + count]


def _even(x, front: int = 0):
    """(B, T, N, H) with ``front`` tokens more in front and, where the number is odd, one behind: jax wants it even in
    training, with a mask or without."""
    return jnp.pad(x, ((0, 0), (front, (front + x.shape[1]) % 2), (0, 0), (0, 0)))


PROGRAMS = {"xla": _xla, "cudnn": _cudnn, "splash": splash.attend}
IMPLEMENTATIONS = ("auto", *PROGRAMS)


def flash_fits(query: Any, key: Any, device: Any = None, dense: bool = True) -> bool:
    """Whether cuDNN's flash attention takes these arrays, or shapes, on ``device``, by default the first one there is.

    It wants an NVIDIA GPU from Ampere on, 16-bit floats, heads of a multiple of 8 and at most 128 values, and, with a
    ``dense`` mask in training, even numbers of queries and keys. One query alone, as in decoding, gains nothing by it.
    """
    (queries, keys) = query.shape[1], key.shape[1]
    even = queries % 2 == 0 and keys % 2 == 0
    return not flash_lacks(query, device) and queries > 1 and (even or not dense)


def flash_lacks(query: Any, device: Any = None) -> str:
    """What cuDNN's flash attention wants that ``query``, an array or a shape, or the device has not; "" if nothing."""
    device = jax.devices()[0] if device is None else device
    capability, size = str(getattr(device, "compute_capability", None)), query.shape[3]
    if device.platform != "gpu" or "." not in capability or float(capability) < AMPERE:  # AMD's say "gfx90a"
        return "an NVIDIA GPU from Ampere on"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"model.dtype=bfloat16, not {query.dtype}"
    return "" if size % 8 == 0 and size <= HEAD_MOST else f"heads of a multiple of 8 and at most {HEAD_MOST} values"


LACKS = {"cudnn": flash_lacks, "splash": splash.device_lacks}


def check_device(config: Any, dtype: Any, device: Any = None) -> None:
    """Raise ``PeftJaxError`` where ``config`` asks for a program that cannot be had here, computing in ``dtype``.

    Not in :class:`AttentionCore`: a program may be compiled for a device that is not there.
    """
    size = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    query = jax.ShapeDtypeStruct((1, 2, config.num_attention_heads, size), dtype)
    asked = config.attn_implementation
    if asked in LACKS and (why := LACKS[asked](query, device)):
        raise PeftJaxError(f"attn_implementation='{asked}' wants {why}: choose auto, which is {asked} where it can be.")


def on_heads(implementation: str, config: Any, parts: int) -> str:
    """``implementation`` for a model whose heads are cut over ``parts`` devices.

    cuDNN's program and splash attention are cut between whole heads only, queries and keys alike: "auto" is "xla" where
    a device would not have as many of them as every other. Raises ``PeftJaxError`` for those two there, and for an
    unknown one.

    >>> from peft_jax.models import GPT2Config
    >>> on_heads("auto", GPT2Config(64, 48, 64, 2, 6, 32), 2), on_heads("auto", GPT2Config(64, 48, 64, 2, 6, 32), 4)
    ('auto', 'xla')
    """
    heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    if _checked(implementation) == "xla" or not any(count % parts for count in heads):
        return implementation
    if implementation in LACKS:
        raise PeftJaxError(f"attn_implementation='{implementation}' with mesh.tensor={parts}: the model's {heads[0]} "
                           f"heads, {heads[1]} of keys, cannot be shared evenly; choose a divisor of both, or auto.")
    return "xla"


def _checked(implementation: str) -> str:
    if implementation not in IMPLEMENTATIONS:
        raise PeftJaxError(f"attn_implementation={implementation!r}: choose {', '.join(IMPLEMENTATIONS)}.")
    return implementation
