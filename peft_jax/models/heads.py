"""What a model is to tell of a text instead of its next token."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Head:
    """A classification or regression head.

    Fields:
      task_type: ``"SEQ_CLS"``, one answer for a whole text, or ``"TOKEN_CLS"``, one for each token (peft's words).
      num_labels: classes; 1 is a regression, as in transformers.
      pooling: what the answer for a text is read from: ``"first"``, its first token, through the layers that
        transformers' models of the type have there; ``"mean"``, the mean over its tokens, directly, as in models of
        sentence embeddings (transformers has no such class).
      labels: what the classes are called, by number; () where they have numbers alone.
    """

    task_type: str = "SEQ_CLS"
    num_labels: int = 2
    pooling: str = "first"
    labels: tuple[str, ...] = ()


TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS")
POOLINGS = ("first", "mean")


def mean_of_seen(x, seen):
    """The mean, in float32, over the tokens that each token may see: (B, S, D), bool (B, S, S) -> (B, S, D)."""
    weights = seen.astype(jnp.float32) / jnp.maximum(seen.sum(-1, keepdims=True), 1)
    return jnp.einsum("bts,bsd->btd", weights, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST).astype(
        x.dtype)
