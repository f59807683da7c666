"""BERT (arXiv 1810.04805), RoBERTa (1907.11692) and DistilBERT (1910.01108): one plain Linen encoder, norms after the
residuals, scanned over its layers. MiniLM and most models of sentence embeddings are BERTs.

Module names are Hugging Face's, so ``target_modules`` means the same here and there. Leaves below ``layer`` have the
layers in front. Dropout, which transformers applies in training, is left out. B batch, S tokens, D hidden, N heads.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from peft_jax.core.remat import keep
from peft_jax.errors import PeftJaxError
from peft_jax.models import masks
from peft_jax.models.attention import AttentionCore
from peft_jax.models.heads import Head, mean_of_seen
from peft_jax.models.layers import scan_layers


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Static sizes and switches of one model; field names are Hugging Face's BERT's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int  # tokens of the longest text; Hugging Face's number for RoBERTa has the offset in it
    layer_norm_eps: float = 1e-12
    type_vocab_size: int = 2  # 0: no token types
    position_offset: int = 0  # the position of the first token: RoBERTa counts from pad_token_id + 1
    hidden_act: str = "gelu"
    model_type: str = "bert"
    head: Head | None = None
    attn_implementation: str = "auto"  # see peft_jax.models.attention


ACTIVATIONS = {"gelu": lambda x: nn.gelu(x, approximate=False), "gelu_new": nn.gelu, "relu": nn.relu}


class Part(nn.Module):
    """What all parts of the model have: the config and the types of computation and parameters."""

    config: EncoderConfig
    dtype: Any
    param_dtype: Any

    def _dense(self, name, features):
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def _norm(self, name):
        return nn.LayerNorm(self.config.layer_norm_eps, self.dtype, self.param_dtype, name=name,
                            use_fast_variance=False)

    def _embed(self, name, rows):
        return nn.Embed(rows, self.config.hidden_size, self.dtype, self.param_dtype, name=name)

    def _part(self, kind, name, **options):
        return kind(self.config, self.dtype, self.param_dtype, name=name, **options)


class Embeddings(Part):
    """Word, position and token type, summed and normed."""

    def setup(self):
        c = self.config
        self.word_embeddings = self._embed(None, c.vocab_size)
        self.position_embeddings = self._embed(None, c.max_position_embeddings + c.position_offset)
        if c.type_vocab_size:
            self.token_type_embeddings = self._embed(None, c.type_vocab_size)
        self.LayerNorm = self._norm(None)

    def words(self, input_ids):
        """Int (B, S) -> (B, S, D)."""
        return self.word_embeddings(input_ids)

    def __call__(self, words, positions, token_type_ids):
        """(B, S, D), two int (B, S) -> (B, S, D)."""
        x = words + self.position_embeddings(positions + self.config.position_offset)
        return self.LayerNorm(x + self.token_type_embeddings(token_type_ids) if self.config.type_vocab_size else x)


class SelfAttention(Part):
    """Attention in both directions; ``names`` of the three projections and, where it is in here, of the fourth."""

    names: tuple[str, ...] = ("query", "key", "value")

    @nn.compact
    def __call__(self, x, mask):
        """(B, S, D) and a boolean mask (B, 1, S, S) -> (B, S, D)."""
        c, (*inner, after) = self.config, (*self.names, None)[:4]
        query, key, value = (keep(self._dense(name, c.hidden_size)(x)).reshape(*x.shape[:2], c.num_attention_heads, -1)
                             for name in inner)
        mixed = AttentionCore(c.attn_implementation, name="core")(query, key, value, mask).reshape(x.shape)
        return keep(self._dense(after, c.hidden_size)(mixed)) if after else mixed


class Output(Part):
    """A projection, added to the residual and normed."""

    @nn.compact
    def __call__(self, x, residual):
        """(B, S, any), (B, S, D) -> (B, S, D)."""
        return self._norm("LayerNorm")(keep(self._dense("dense", self.config.hidden_size)(x)) + residual)


class Attention(Part):
    @nn.compact
    def __call__(self, x, mask):
        """(B, S, D) -> (B, S, D)."""
        return self._part(Output, "output")(self._part(SelfAttention, "self")(x, mask), x)


class Intermediate(Part):
    @nn.compact
    def __call__(self, x):
        """(B, S, D) -> (B, S, intermediate)."""
        c = self.config
        return ACTIVATIONS[c.hidden_act](keep(self._dense("dense", c.intermediate_size)(x)))


class BertLayer(Part):
    """The body of a scan."""

    @nn.compact
    def __call__(self, x, mask):
        """(B, S, D) -> ((B, S, D), None)."""
        x = self._part(Attention, "attention")(x, mask)
        return self._part(Output, "output")(self._part(Intermediate, "intermediate")(x), x), None


class FeedForward(Part):
    @nn.compact
    def __call__(self, x):
        """(B, S, D) -> (B, S, D)."""
        c = self.config
        inner = ACTIVATIONS[c.hidden_act](keep(self._dense("lin1", c.intermediate_size)(x)))
        return keep(self._dense("lin2", c.hidden_size)(inner))


class DistilBertLayer(Part):
    """The same layer under DistilBERT's names."""

    @nn.compact
    def __call__(self, x, mask):
        """(B, S, D) -> ((B, S, D), None)."""
        names = ("q_lin", "k_lin", "v_lin", "out_lin")
        x = self._norm("sa_layer_norm")(self._part(SelfAttention, "attention", names=names)(x, mask) + x)
        return self._norm("output_layer_norm")(self._part(FeedForward, "ffn")(x) + x), None


class Layers(Part):
    """All layers as one scan."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, mask):
        """(B, S, D) -> (B, S, D)."""
        layer = DistilBertLayer if self.config.model_type == "distilbert" else BertLayer
        stack = scan_layers(self, layer)
        return self._part(stack, "layer")(x, mask)[0]


class Pooler(Part):
    @nn.compact
    def __call__(self, x):
        """(..., D) -> (..., D)."""
        return nn.tanh(self._dense("dense", self.config.hidden_size)(x))


class RobertaHead(Part):
    num_labels: int

    @nn.compact
    def __call__(self, x):
        """(..., D) -> (..., labels)."""
        return self._dense("out_proj", self.num_labels)(nn.tanh(self._dense("dense", self.config.hidden_size)(x)))


class Encoder(nn.Module):
    """An encoder, with a head where the config has one.

    ``dtype`` is the compute type, ``param_dtype`` that of fresh parameters; ``remat`` as of ``llama.CausalLM``.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool = False
    sharding = (  # how weights are cut over a mesh: see peft_jax.parallel.partitioning
        (r".*/(query|key|value|q_lin|k_lin|v_lin|intermediate/dense|lin1)/kernel", ("fsdp", "tensor")),
        (r".*/(output/dense|out_lin|lin2)/kernel", ("tensor", "fsdp")),
        (r".*/word_embeddings/embedding", ("tensor", "fsdp")),
        (r".*/(position|token_type)_embeddings/embedding", (None, "fsdp")),
        (r"(pooler/dense|pre_classifier|classifier(/dense|/out_proj)?)/kernel", ("fsdp", None)),
        (r".*/(scale|bias)", ()))

    def setup(self):
        c, kinds = self.config, (self.dtype, self.param_dtype)
        self.embeddings = Embeddings(c, *kinds)
        if c.model_type == "distilbert":
            self.transformer = Layers(c, *kinds, remat=self.remat)
        else:
            self.encoder = Layers(c, *kinds, remat=self.remat)
        if c.head is None:
            return
        through = c.model_type if c.head.task_type == "SEQ_CLS" and c.head.pooling == "first" else ""
        if through == "roberta":
            self.classifier = RobertaHead(c, *kinds, c.head.num_labels)
            return
        if through == "bert":
            self.pooler = Pooler(c, *kinds)
        if through == "distilbert":
            self.pre_classifier = nn.Dense(c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        self.classifier = nn.Dense(c.head.num_labels, dtype=self.dtype, param_dtype=self.param_dtype)

    def __call__(self, input_ids, attention_mask=None, *, token_type_ids=None, positions=None, segment_ids=None,
                 lengths=None):
        """Logits (batch, labels) of each text, (batch, seq, labels) of each token, or, without a head, hidden states
        (batch, seq, hidden), in ``dtype``, for ``input_ids`` int (batch, seq).

        Args:
          attention_mask: (batch, seq), 1 for real tokens, padding on either side.
          token_type_ids: int (batch, seq), zeros by default.
          positions: int (batch, seq); by default real tokens are counted from 0, anew in each segment.
          segment_ids: int (batch, seq) for packed rows: tokens see their own segment only; 0 is padding.
          lengths: int (batch,), real tokens of rows that are padded on the right.

        Raises ``PeftJaxError`` for inputs whose shapes do not fit, and for packed rows where each row has one answer:
        take :meth:`hidden` and :meth:`head`.
        """
        head = self.config.head
        whole = head is not None and head.task_type == "SEQ_CLS"
        if whole and segment_ids is not None:
            raise PeftJaxError("a row has one answer for one text, but segment_ids pack several into it: apply "
                               "method='hidden', pick the first token of each text, then method='head'.")
        states = self.hidden(input_ids, attention_mask, token_type_ids=token_type_ids, positions=positions,
                             segment_ids=segment_ids, lengths=lengths)
        if whole:
            real = masks.real_tokens(input_ids, attention_mask, None)
            states = jnp.take_along_axis(states, jnp.argmax(real, 1)[:, None, None], axis=1)[:, 0]
        return states if head is None else self.head(states)

    def hidden(self, input_ids, attention_mask=None, *, token_type_ids=None, positions=None, segment_ids=None,
               lengths=None):
        """The states (batch, seq, hidden) that :meth:`head` reads, arguments as of ``__call__``: see :meth:`pool`."""
        masks.check_inputs(input_ids, attention_mask, positions, segment_ids, lengths)
        real = masks.real_tokens(input_ids, attention_mask, segment_ids, lengths)
        if positions is None and segment_ids is None:
            self.check_length(masks.longest(input_ids, attention_mask, lengths))
        if positions is None:
            positions = masks.count_positions(real, segment_ids, None, None)
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        layers = self.transformer if self.config.model_type == "distilbert" else self.encoder
        rows = masks.row_mask(input_ids, segment_ids, lengths, causal=False)
        seen, _ = self.visible(None if attention_mask is None else real, positions, None, rows)
        x = layers(self.embeddings(self.embed(input_ids), self.place(positions), types), seen)
        return self.pool(x, masks.same_text(real, segment_ids))

    def check_length(self, tokens: int) -> None:
        """Raise ``PeftJaxError`` where rows of ``tokens`` have more than there are positions."""
        masks.check_length(self.config, tokens)

    def place(self, positions):
        """The positions that are embedded, int (batch, seq), of tokens at ``positions``: the same ones."""
        return positions

    def embed(self, input_ids):
        """The embeddings (batch, seq, hidden) of ``input_ids`` (batch, seq), to which positions and types are added."""
        return self.embeddings.words(input_ids)

    def visible(self, key_mask, positions, index, rows):
        """Who sees whom, of keys of which ``key_mask`` (B, S) are real: a boolean mask (B, 1, S, S), or ``rows``
        without it; and ``None``, as no layer has a window. Names are those of
        :class:`peft_jax.models.llama.CausalLM`, ``index`` is ``None``."""
        return rows if key_mask is None else masks.same_text(key_mask, rows.segment_ids)[:, None], None

    def pool(self, x, seen):
        """For every token what its answer is read from, (B, S, D), of states ``x`` and, (B, S, S), which tokens are of
        its text: with one answer for a text its first token's state or the mean, else its own state."""
        head = self.config.head
        if head is not None and head.pooling == "mean":
            return mean_of_seen(x, seen)
        if head is None or head.task_type != "SEQ_CLS":
            return x
        return jnp.take_along_axis(x, jnp.argmax(seen, -1)[..., None], axis=1)

    def head(self, states):
        """Logits (..., labels) of states (..., hidden) from :meth:`hidden`."""
        head = self.config.head
        if head is None:
            raise PeftJaxError("this encoder has no head: load it with head=Head(...), see peft_jax.load_pretrained.")
        if head.task_type == "SEQ_CLS" and head.pooling == "first" and self.config.model_type != "roberta":
            first = self.pooler if self.config.model_type == "bert" else lambda x: nn.relu(self.pre_classifier(x))
            states = first(states)
        return self.classifier(states)
