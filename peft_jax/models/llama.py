"""The Llama family as one plain Linen decoder, scanned over its layers: Llama 2 to 3.2, SmolLM2, Mistral, Qwen2, Qwen3.

Module names are Hugging Face's, so ``target_modules`` means the same here and there. Each leaf below ``layers`` has the
layers as its leading axis. B batch, T query tokens, S key slots, D hidden, N heads, K key/value heads, H head size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from peft_jax.core.remat import keep
from peft_jax.errors import PeftJaxError
from peft_jax.models import cache, masks, rope
from peft_jax.models.attention import AttentionCore
from peft_jax.models.layers import scan_layers

# How weights are cut over a mesh: see peft_jax.parallel.partitioning.
SHARDING = (
    (r"(.*/)?(q|k|v|gate|up)_proj/kernel", ("fsdp", "tensor")),
    (r"(.*/)?(o|down)_proj/kernel", ("tensor", "fsdp")),
    (r"(.*/)?(q|k|v|gate|up)_proj/bias", ("tensor",)),
    (r"embed_tokens/embedding", ("tensor", "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r".*/(scale|bias)", ()),
)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Static sizes and switches of one model; field names are Hugging Face's where it has the field."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: tuple[tuple[str, float | str], ...] | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None  # tokens that a windowed layer sees, itself included
    sliding_layers: tuple[bool, ...] = ()  # which layers are windowed; () is none
    model_type: str = "llama"
    attn_implementation: str = "auto"  # see peft_jax.models.attention


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and an optional cache."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, cos, sin, mask, index):
        """(B, T, D) -> (B, T, D); ``index`` is the first free cache slot, ``None`` without a cache."""
        c = self.config
        query = self._project("q_proj", x, c.num_attention_heads)
        key = self._project("k_proj", x, c.num_key_value_heads)
        value = self._project("v_proj", x, c.num_key_value_heads)
        if c.qk_norm:
            query, key = self._norm("q_norm")(query), self._norm("k_norm")(key)
        query, key = rope.rotate(query, cos, sin), rope.rotate(key, cos, sin)
        if index is not None:
            key, value = cache.remember(self, "key", key, index), cache.remember(self, "value", value, index)
        mixed = AttentionCore(c.attn_implementation, name="core")(query, key, value, mask)
        out = nn.Dense(c.hidden_size, c.out_bias, self.dtype, self.param_dtype, name="o_proj")
        return keep(out(mixed.reshape(*mixed.shape[:2], c.num_attention_heads * c.head_dim)))

    def _project(self, name, x, heads):
        c = self.config
        flat = keep(nn.Dense(heads * c.head_dim, c.qkv_bias, self.dtype, self.param_dtype, name=name)(x))
        return flat.reshape(*flat.shape[:2], heads, c.head_dim)

    def _norm(self, name):
        return nn.RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype, name=name)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        """(B, T, D) -> (B, T, D)."""
        c = self.config
        gate = keep(self._dense("gate_proj", c.intermediate_size)(x))
        up = keep(self._dense("up_proj", c.intermediate_size)(x))
        return self._dense("down_proj", c.hidden_size)(nn.silu(gate) * up)

    def _dense(self, name, features):
        return nn.Dense(features, self.config.mlp_bias, self.dtype, self.param_dtype, name=name)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind an RMS norm and beside a residual; written as the body of a scan."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, windowed, cos, sin, mask, window_mask, index):
        """(B, T, D) -> ((B, T, D), None); ``windowed`` is this layer's boolean scalar."""
        c = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mask = masks.of_layer(windowed, mask, window_mask)
        normed = nn.RMSNorm(c.rms_norm_eps, **kinds, name="input_layernorm")(x)
        x = x + SelfAttention(c, **kinds, name="self_attn")(normed, cos, sin, mask, index)
        normed = nn.RMSNorm(c.rms_norm_eps, **kinds, name="post_attention_layernorm")(x)
        return x + MLP(c, **kinds, name="mlp")(normed), None


def untie(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """``params`` with a head of its own, ``lm_head/kernel`` (D, V), equal to the embedding's transpose.

    :class:`CausalLM` then uses it, so that head and embedding can be trained, or frozen, one without the other. Params
    that have a head come back as they are. Raises ``PeftJaxError`` where there is no embedding to take it from.
    """
    if not isinstance(params, Mapping):
        raise PeftJaxError(f"untie: params are a {type(params).__name__}: give the whole parameter tree.")
    if "lm_head" in params:
        return params
    tied = next((name for name in ("embed_tokens", "wte") if name in params), None)
    if tied is None:
        raise PeftJaxError("untie: params have no 'embed_tokens': give the whole tree, combine(frozen, trainable).")
    return {**params, "lm_head": {"kernel": params[tied]["embedding"].T}}


class CausalLM(nn.Module):
    """A decoder with a language-model head.

    ``dtype`` is the compute type, ``param_dtype`` that of freshly made parameters. The backward pass keeps the layers'
    projections and computes what lies between them again (attention too), which is faster than fetching it from memory
    and halves what is kept there (LOG.md, 2026-11-24); with ``remat`` it keeps each layer's input alone. A ``lm_head``
    in the parameters is used whenever there is one; without it the embedding serves as the head.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    sharding = SHARDING

    def setup(self):
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stack = scan_layers(self, DecoderLayer, in_axes=(0, *[nn.broadcast] * 5))
        self.embed_tokens = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        self.layers = stack(c, **kinds)
        self.norm = nn.RMSNorm(c.rms_norm_eps, **kinds)
        self.lm_head = nn.Dense(c.vocab_size, use_bias=False, **kinds)

    def __call__(self, input_ids, attention_mask=None, *, positions=None, segment_ids=None, lengths=None):
        """Logits (batch, seq, vocab) in ``dtype`` for ``input_ids`` int (batch, seq).

        Args:
          attention_mask: (batch, seq), 1 for real tokens, padding on either side. With a cache: of the new tokens only.
          positions: int (batch, seq); by default real tokens are counted from 0, anew in each segment.
          segment_ids: int (batch, seq) for packed rows: tokens see their own segment only; 0 is padding.
          lengths: int (batch,) for rows of one text each, padded on the right: how many real tokens they have. Without
            any of the three all tokens are real. Where there is no attention_mask, kernels get no mask but these words.

        A ``cache`` collection (see :meth:`init_cache`), passed as mutable, is read and extended.
        Raises ``PeftJaxError`` for inputs whose shapes do not fit, and for a full cache; under ``jit``, where nobody
        can see how full it is, tokens beyond it give NaN.
        """
        return self.head(self.hidden(input_ids, attention_mask, positions=positions, segment_ids=segment_ids,
                                     lengths=lengths))

    def hidden(self, input_ids, attention_mask=None, *, positions=None, segment_ids=None, lengths=None):
        """The normed last hidden states (batch, seq, hidden), arguments as of ``__call__``."""
        positions, key_mask, index, rows = cache.arrived(self, input_ids, attention_mask, positions, segment_ids,
                                                         lengths)
        cos, sin = rope.angles(self.place(positions), rope.inverse_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling))
        full, windowed = self.visible(key_mask, positions, index, rows)
        flags = self.config.sliding_layers or (False,) * self.config.num_hidden_layers
        if all(flags):  # known here, so that the layers need no choice
            full, windowed = windowed, None
        x = cache.spoiled(self.embed(input_ids), index, key_mask)
        x, _ = self.layers(x, jnp.asarray(flags), cos, sin, full, windowed, index)
        return self.norm(x)

    def place(self, positions):
        """The positions that are rotated by, int (batch, seq), of tokens at ``positions``: the same ones."""
        return positions

    def embed(self, input_ids):
        """The first layer's input (batch, seq, hidden) of ``input_ids`` (batch, seq)."""
        return self.embed_tokens(input_ids)

    def visible(self, key_mask, positions, index, rows):
        """Who sees whom, of queries at ``positions`` (B, T) and keys of which ``key_mask`` (B, S) are real: two masks,
        for layers without a window and for those with one, ``None`` where there is none. They are boolean arrays
        (B, 1, T, S) or, without a key_mask, :class:`peft_jax.models.masks.RowMask` like ``rows``.
        """
        return masks.attention_masks(key_mask, positions.shape[1], index, rows, self._window())

    def head(self, hidden):
        """Logits (..., vocab) of hidden states (..., hidden)."""
        if self.has_variable("params", "lm_head") or not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        return self.embed_tokens.attend(hidden)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty ``cache`` collection for ``length`` tokens a row: zeros, keys and values (L, B, S, K, H) each."""
        c = self.config
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        return cache.empty("layers", "self_attn", shape, self.dtype)

    def _window(self):
        return self.config.sliding_window if any(self.config.sliding_layers) else None
