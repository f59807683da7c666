"""GPT-2 (Radford et al. 2019) as a plain Linen decoder, scanned over its layers: norms before the residual branches,
learned positions, and query, key and value from one projection, ``c_attn``.

Module names are Hugging Face's, so ``target_modules`` means the same here and there. Each leaf below ``h`` has the
layers as its leading axis. The model's own dropout, which transformers applies in training, is left out. B batch,
T query tokens, S key slots, D hidden, N heads, H head size.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from peft_jax.core.remat import keep
from peft_jax.models import cache, masks
from peft_jax.models.attention import AttentionCore
from peft_jax.models.layers import scan_layers

# How weights are cut over a mesh: see peft_jax.parallel.partitioning.
SHARDING = (
    (r"(.*/)?(c_attn|c_fc)/kernel", ("fsdp", "tensor")),
    (r"(.*/)?c_proj/kernel", ("tensor", "fsdp")),
    (r"wte/embedding", ("tensor", "fsdp")),
    (r"wpe/embedding", (None, "fsdp")),
    (r"lm_head/kernel", ("fsdp", "tensor")),
    (r".*/(scale|bias)", ()),
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Static sizes and switches of one model, under the names that all our decoders have."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    model_type: str = "gpt2"
    attn_implementation: str = "auto"  # see peft_jax.models.attention


class Attention(nn.Module):
    """Causal attention with an optional cache."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, mask, index):
        """(B, T, D) -> (B, T, D); ``index`` is the first free cache slot, ``None`` without a cache."""
        c, kinds = self.config, (True, self.dtype, self.param_dtype)
        joint = keep(nn.Dense(3 * c.hidden_size, *kinds, name="c_attn")(x))
        query, key, value = jnp.moveaxis(joint.reshape(*x.shape[:2], 3, c.num_attention_heads, -1), 2, 0)
        if index is not None:
            key, value = cache.remember(self, "key", key, index), cache.remember(self, "value", value, index)
        mixed = AttentionCore(c.attn_implementation, name="core")(query, key, value, mask)
        return keep(nn.Dense(c.hidden_size, *kinds, name="c_proj")(mixed.reshape(x.shape)))


class MLP(nn.Module):
    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        """(B, T, D) -> (B, T, D)."""
        c, kinds = self.config, (True, self.dtype, self.param_dtype)
        inner = nn.gelu(keep(nn.Dense(c.intermediate_size, *kinds, name="c_fc")(x)))  # the tanh form
        return keep(nn.Dense(c.hidden_size, *kinds, name="c_proj")(inner))


class Block(nn.Module):
    """The body of a scan."""

    config: GPT2Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, mask, index):
        """(B, T, D) -> ((B, T, D), None)."""
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        norm = {"use_fast_variance": False, **kinds}
        normed = nn.LayerNorm(c.layer_norm_epsilon, **norm, name="ln_1")(x)
        x = x + Attention(c, **kinds, name="attn")(normed, mask, index)
        return x + MLP(c, **kinds, name="mlp")(nn.LayerNorm(c.layer_norm_epsilon, **norm, name="ln_2")(x)), None


class GPT2(nn.Module):
    """The decoder with a language-model head; types, ``remat``, arguments and methods are those of
    :class:`peft_jax.models.llama.CausalLM`."""

    config: GPT2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    sharding = SHARDING

    def setup(self):
        c, kinds = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        stack = scan_layers(self, Block)
        self.wte = nn.Embed(c.vocab_size, c.hidden_size, **kinds)
        self.wpe = nn.Embed(c.max_position_embeddings, c.hidden_size, **kinds)
        self.h = stack(c, **kinds)
        self.ln_f = nn.LayerNorm(c.layer_norm_epsilon, use_fast_variance=False, **kinds)
        self.lm_head = nn.Dense(c.vocab_size, use_bias=False, **kinds)

    def __call__(self, input_ids, attention_mask=None, *, positions=None, segment_ids=None, lengths=None):
        """Logits (batch, seq, vocab) in ``dtype`` for ``input_ids`` int (batch, seq)."""
        return self.head(self.hidden(input_ids, attention_mask, positions=positions, segment_ids=segment_ids,
                                     lengths=lengths))

    def hidden(self, input_ids, attention_mask=None, *, positions=None, segment_ids=None, lengths=None):
        """The normed last hidden states (batch, seq, hidden), arguments as of ``__call__``."""
        counted = positions is None and segment_ids is None
        positions, key_mask, index, rows = cache.arrived(self, input_ids, attention_mask, positions, segment_ids,
                                                         lengths)
        if counted and index is None:
            self.check_length(masks.longest(input_ids, attention_mask, lengths))
        seen, _ = self.visible(key_mask, positions, index, rows)
        x = self.embed(input_ids) + self.wpe(self.place(positions))
        x, _ = self.h(cache.spoiled(x, index, key_mask), seen, index)
        return self.ln_f(x)

    def check_length(self, tokens: int) -> None:
        """Raise ``PeftJaxError`` where rows of ``tokens`` have more than there are positions."""
        masks.check_length(self.config, tokens)

    def place(self, positions):
        """The positions that are embedded, int (batch, seq), of tokens at ``positions``: the same ones."""
        return positions

    def embed(self, input_ids):
        """The embeddings (batch, seq, hidden) of ``input_ids`` (batch, seq), to which those of positions are added."""
        return self.wte(input_ids)

    def visible(self, key_mask, positions, index, rows):
        """Who sees whom: a mask, and ``None``, since no layer has a window."""
        return masks.attention_masks(key_mask, positions.shape[1], index, rows, None)

    def head(self, hidden):
        """Logits (..., vocab) of hidden states (..., hidden)."""
        if self.has_variable("params", "lm_head") or not self.config.tie_word_embeddings:
            return self.lm_head(hidden)
        return self.wte.attend(hidden)

    def init_cache(self, batch: int, length: int) -> dict:
        """An empty ``cache`` collection for ``length`` tokens a row."""
        c = self.config
        shape = (c.num_hidden_layers, batch, length, c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        return cache.empty("h", "attn", shape, self.dtype)
