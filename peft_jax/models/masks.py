"""Which token may see which. Boolean masks, ``True`` is visible. B batch, T query tokens, S key slots."""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from peft_jax.errors import PeftJaxError


def check_inputs(input_ids, attention_mask, positions, segment_ids) -> None:
    """Raise ``PeftJaxError`` unless ``input_ids`` is integer (batch, seq) and the others have its shape."""
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise PeftJaxError(f"input_ids are {input_ids.dtype} {input_ids.shape}: give integers (batch, seq).")
    given = {"attention_mask": attention_mask, "positions": positions, "segment_ids": segment_ids}
    for name, array in given.items():
        if array is not None and array.shape != input_ids.shape:
            raise PeftJaxError(f"{name} has shape {array.shape}, input_ids {input_ids.shape}: they must be equal.")


def check_length(config, tokens: int) -> None:
    """Raise ``PeftJaxError`` where there are more ``tokens`` than learned positions: the others' would be NaN."""
    if tokens > config.max_position_embeddings:
        raise PeftJaxError(f"a row of {tokens} tokens is longer than the model's {config.max_position_embeddings} "
                           "positions: shorten it.")


def longest(input_ids, attention_mask) -> int:
    """How many tokens, counted from 0, the longest row has; 0 where a traced mask does not tell."""
    if attention_mask is None or isinstance(attention_mask, Tracer):
        return input_ids.shape[1] if attention_mask is None else 0
    return int(np.sum(np.asarray(attention_mask) != 0, axis=1).max(initial=0))


def check_room(index, new: int, slots: int, segment_ids) -> None:
    """Raise ``PeftJaxError`` unless ``new`` tokens fit a cache of ``slots`` whose first free one is ``index``.

    A write past the end would overwrite the last slots silently. A traced ``index`` cannot be looked at: then only the
    sizes are compared, and the model gives NaN for what does not fit.
    """
    used = 0 if isinstance(index, Tracer) else int(index)
    if segment_ids is not None or used + new > slots:
        raise PeftJaxError(f"the cache holds {slots} tokens a row and no packed segments; {used} are in it and {new} "
                           "more came: make a longer cache, or run without one.")


def real_tokens(input_ids, attention_mask, segment_ids):
    """(B, T): true where a token is no padding."""
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    return mask if segment_ids is None else mask & (segment_ids != 0)


def count_positions(mask, segment_ids, key_mask, index):
    """(B, T) int32: real tokens counted from 0, anew in each segment, after those already in the cache."""
    counted = jnp.cumsum(mask, axis=1) - 1
    if index is not None:
        counted += jnp.sum(key_mask, axis=1, keepdims=True) - jnp.sum(mask, axis=1, keepdims=True)
    if segment_ids is not None:
        starts = jnp.concatenate([jnp.ones_like(mask[:, :1]), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
        counted -= jnp.maximum.accumulate(jnp.where(starts, counted, 0), axis=1)
    return jnp.maximum(counted, 0).astype(jnp.int32)


def attention_masks(key_mask, queries: int, index, segment_ids, window: int | None):
    """The causal mask (B, 1, T, S) and, where some layers have a ``window`` (tokens), theirs; else ``None``."""
    slots = jnp.arange(key_mask.shape[1])
    at = jnp.arange(queries) + (0 if index is None else index)
    distance = at[:, None] - slots[None, :]
    full = (distance >= 0) & key_mask[:, None, None, :]
    if segment_ids is not None:
        full &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return full, None if window is None else full & (distance < window)


def same_text(key_mask, segment_ids):
    """Of an encoder, where all real tokens of a text see one another: (B, S, S)."""
    seen = key_mask[:, None, :] & jnp.ones_like(key_mask)[:, :, None]
    return seen if segment_ids is None else seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
