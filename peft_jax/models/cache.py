"""The cache of a decoder: a ``cache`` collection with the first free slot, the mask of all slots, and in each layer
keys and values. B batch, T new tokens, S slots.
"""

import jax
import jax.numpy as jnp

from peft_jax.models import masks


def empty(stack: str, attention: str, shape: tuple[int, ...], dtype) -> dict:
    """A collection with keys and values (L, B, S, K, H) = ``shape`` in module ``attention`` of the layers ``stack``."""
    slots = {name: jnp.zeros(shape, dtype) for name in ("key", "value")}
    return {"index": jnp.zeros((), jnp.int32), "mask": jnp.zeros(shape[1:3], bool), stack: {attention: slots}}


def extend(model, mask, segment_ids):
    """The first free slot and the mask of all slots (B, S), this call's (B, T) included; ``(None, mask)`` uncached."""
    if not model.has_variable("cache", "index"):
        return None, mask
    index, held = model.get_variable("cache", "index"), model.get_variable("cache", "mask")
    masks.check_room(index, mask.shape[1], held.shape[1], segment_ids)
    held = jax.lax.dynamic_update_slice(held, mask, (0, index))
    model.put_variable("cache", "mask", held)
    model.put_variable("cache", "index", index + mask.shape[1])
    return index, held


def arrived(model, input_ids, attention_mask, positions, segment_ids, lengths):
    """``(positions, mask of all slots, first free slot, rows)`` of a decoder's call, checked: positions as given or
    counted, the mask (B, S) and the slot as of :func:`extend`, but no mask where ``rows``, a
    :class:`peft_jax.models.masks.RowMask`, says it all."""
    masks.check_inputs(input_ids, attention_mask, positions, segment_ids, lengths)
    mask = masks.real_tokens(input_ids, attention_mask, segment_ids, lengths)
    index, key_mask = extend(model, mask, segment_ids)
    if positions is None:
        positions = masks.count_positions(mask, segment_ids, key_mask, index)
    rows = masks.row_mask(input_ids, segment_ids, lengths, causal=True)
    in_words = attention_mask is None and index is None
    return positions, None if in_words else key_mask, index, rows


def remember(attention, name, new, index):
    """Write (B, T, K, H) into a layer's cache from slot ``index`` on; the whole cache (B, S, K, H) comes back."""
    held = jax.lax.dynamic_update_slice(attention.get_variable("cache", name), new, (0, index, 0, 0))
    attention.put_variable("cache", name, held)
    return held


def spoiled(x, index, key_mask):
    """``x`` (B, T, D), NaN where the cache overflowed; see :func:`peft_jax.models.masks.check_room`."""
    return x if index is None else jnp.where(index + x.shape[1] > key_mask.shape[1], jnp.nan, x)
