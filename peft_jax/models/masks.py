"""Which token may see which: in a few words where they do, else as an array. B batch, T query tokens, S keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from peft_jax.errors import PeftJaxError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMask:
    """Who sees whom in rows that begin with their first token, without an array (T, S): a kernel that knows these
    words skips blocks instead of reading one.

    The last query stands at the last key, so keys that are more than the queries are in front, and all queries see
    them. Of a causal row no real token needs ``lengths``: padding is behind it.

    Fields:
      keys: S.
      causal: whether a token sees only those before it, and itself.
      lengths: int (B,) real keys of each row, at least 1; ``None`` is all.
      segment_ids: int (B, S) for packed rows: tokens see their own segment only. Queries are as many as keys.
      window: tokens that one sees, itself included; ``None`` is all.
      windowed: boolean scalar, whether the window holds in this layer; ``None`` is yes.
      mesh: of several devices, over which rows and heads are cut; see :func:`peft_jax.bind`.
    """

    keys: int = dataclasses.field(metadata={"static": True})
    causal: bool = dataclasses.field(metadata={"static": True})
    lengths: jax.Array | None = None
    segment_ids: jax.Array | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    windowed: jax.Array | None = None
    mesh: jax.sharding.Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def packed(self) -> bool:
        return self.segment_ids is not None

    def behind(self, count: int) -> "RowMask":
        """The same with ``count`` keys more in front, which every query sees."""
        lengths = None if self.lengths is None else self.lengths + count
        return dataclasses.replace(self, keys=self.keys + count, lengths=lengths)


def check_inputs(input_ids, attention_mask, positions, segment_ids, lengths=None) -> None:
    """Raise ``PeftJaxError`` unless ``input_ids`` is integer (batch, seq), ``lengths`` (batch,), and the others have
    the shape of the ids; and where rows are both packed and of one text."""
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise PeftJaxError(f"input_ids are {input_ids.dtype} {input_ids.shape}: give integers (batch, seq).")
    given = {"attention_mask": attention_mask, "positions": positions, "segment_ids": segment_ids}
    for name, array in given.items():
        if array is not None and array.shape != input_ids.shape:
            raise PeftJaxError(f"{name} has shape {array.shape}, input_ids {input_ids.shape}: they must be equal.")
    if lengths is not None and (segment_ids is not None or lengths.shape != input_ids.shape[:1]):
        raise PeftJaxError(f"lengths have shape {lengths.shape}, input_ids {input_ids.shape}: give one number a row, "
                           "and no segment_ids beside it, which are for rows of several texts.")


def check_length(config, tokens: int) -> None:
    """Raise ``PeftJaxError`` where there are more ``tokens`` than learned positions: the others' would be NaN."""
    if tokens > config.max_position_embeddings:
        raise PeftJaxError(f"a row of {tokens} tokens is longer than the model's {config.max_position_embeddings} "
                           "positions: shorten it.")


def longest(input_ids, attention_mask, lengths=None) -> int:
    """How many tokens, counted from 0, the longest row has; 0 where a traced mask, or traced lengths, do not tell."""
    if isinstance(attention_mask, Tracer) or isinstance(lengths, Tracer):
        return 0
    real = np.ones(input_ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    if lengths is not None:
        real &= np.arange(input_ids.shape[1]) < np.asarray(lengths)[:, None]
    return int(np.sum(real, axis=1).max(initial=0))


def check_room(index, new: int, slots: int, segment_ids) -> None:
    """Raise ``PeftJaxError`` unless ``new`` tokens fit a cache of ``slots`` whose first free one is ``index``.

    A write past the end would overwrite the last slots silently. A traced ``index`` cannot be looked at: then only the
    sizes are compared, and the model gives NaN for what does not fit.
    """
    used = 0 if isinstance(index, Tracer) else int(index)
    if segment_ids is not None or used + new > slots:
        raise PeftJaxError(f"the cache holds {slots} tokens a row and no packed segments; {used} are in it and {new} "
                           "more came: make a longer cache, or run without one.")


def real_tokens(input_ids, attention_mask, segment_ids, lengths=None):
    """(B, T): true where a token is no padding."""
    mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    if lengths is not None:
        mask &= jnp.arange(input_ids.shape[1]) < lengths[:, None]
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


def row_mask(input_ids, segment_ids, lengths, causal: bool) -> RowMask:
    """What rows say of themselves. Rows of padding alone, which fill a batch, are taken for one token long: a softmax
    over nothing has no finite result."""
    lengths = None if lengths is None else jnp.maximum(lengths, 1)
    return RowMask(input_ids.shape[1], causal, lengths, segment_ids)


def attention_masks(key_mask, queries: int, index, rows: RowMask, window: int | None):
    """The causal mask and, where some layers have a ``window`` (tokens), theirs; else ``None``.

    ``rows``, or arrays (B, 1, T, S) where ``key_mask`` (B, S) says which keys are real: padding on the left and the
    slots of a cache have no shorter words.
    """
    if key_mask is None:
        return rows, None if window is None else dataclasses.replace(rows, window=window)
    slots = jnp.arange(key_mask.shape[1])
    at = jnp.arange(queries) + (0 if index is None else index)
    distance = at[:, None] - slots[None, :]
    full = (distance >= 0) & key_mask[:, None, None, :]
    if rows.segment_ids is not None:
        full &= (rows.segment_ids[:, :, None] == rows.segment_ids[:, None, :])[:, None]
    return full, None if window is None else full & (distance < window)


def of_layer(windowed, full, window_mask):
    """The mask of a layer that has a window where the boolean scalar ``windowed`` is true."""
    if window_mask is None:
        return full
    if isinstance(window_mask, RowMask):
        return dataclasses.replace(window_mask, windowed=windowed)
    return jnp.where(windowed, window_mask, full)


def by_window(mask: RowMask, attend):
    """``attend(window)`` with the window of this layer, or ``None``: chosen as it runs where layers differ."""
    if mask.window is None or mask.keys <= mask.window:
        return attend(None)
    if mask.windowed is None:
        return attend(mask.window)
    return jax.lax.cond(mask.windowed, lambda: attend(mask.window), lambda: attend(None))


def keys(mask) -> int:
    """S, of either kind of mask."""
    return mask.keys if isinstance(mask, RowMask) else mask.shape[-1]


def dense(mask, shape: tuple[int, ...]):
    """``mask`` as a boolean array (B, 1, T, S), which it may be already, for ``shape`` (B, T); ``None`` stays."""
    if not isinstance(mask, RowMask):
        return mask
    rows, queries = shape
    slots = jnp.arange(mask.keys)
    distance = jnp.arange(mask.keys - queries, mask.keys)[:, None] - slots
    seen = ((distance >= 0) | (not mask.causal))[None, None]
    if mask.window is not None:
        near = distance < mask.window
        seen &= near if mask.windowed is None else near | ~mask.windowed
    if mask.lengths is not None:
        seen &= (slots < mask.lengths[:, None])[:, None, None]
    if mask.segment_ids is not None:
        ids = mask.segment_ids
        seen &= ((ids[:, :, None] == ids[:, None, :]) & (ids != 0)[:, None, :])[:, None]
    return jnp.broadcast_to(seen, (rows, 1, queries, mask.keys))


def behind(mask, count: int, shape: tuple[int, ...] | None):
    """``mask`` with ``count`` keys more in front, which every query sees: in words, or, with a ``shape`` (B, T), as an
    array; ``None`` stays."""
    if mask is None or shape is None:
        return None if mask is None else mask.behind(count)
    return jnp.pad(dense(mask, shape), [(0, 0)] * 3 + [(count, 0)], constant_values=True)


def same_text(key_mask, segment_ids):
    """Of an encoder, where all real tokens of a text see one another: (B, S, S)."""
    seen = key_mask[:, None, :] & jnp.ones_like(key_mask)[:, :, None]
    return seen if segment_ids is None else seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
