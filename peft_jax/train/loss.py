"""Cross entropy where there is a loss, in chunks: (batch, seq, vocab) logits never exist at once."""

import jax
import jax.numpy as jnp
import optax


def pick(hidden, index):
    """The hidden states (batch, n, hidden) at positions ``index`` int (batch, n) of (batch, seq, hidden)."""
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def summed_loss(head, hidden, target, weight, chunk: int):
    """Weighted sum of token cross entropies in nats, float32, and the sum of weights.

    Args:
      head: (tokens, hidden) -> logits (tokens, vocab).
      hidden: (batch, n, hidden). target: int (batch, n). weight: float32 (batch, n), 0 for padding.
      chunk: tokens whose logits exist at once; the backward pass computes them again.
    """
    size = target.size
    chunk = min(chunk, size)
    fill = -size % chunk
    parts = [jnp.pad(x.reshape(size, *x.shape[2:]), [(0, fill)] + [(0, 0)] * (x.ndim - 2)).reshape(
        -1, chunk, *x.shape[2:]) for x in (hidden, target, weight)]

    def one(total, part):
        states, targets, weights = part
        losses = optax.softmax_cross_entropy_with_integer_labels(head(states).astype(jnp.float32), targets)
        return total + jnp.sum(losses * weights), None

    if size == chunk:  # one chunk: no loop, and nothing worth computing twice
        return one(jnp.float32(0), [part[0] for part in parts])[0], weight.sum()
    return jax.lax.scan(jax.checkpoint(one), jnp.float32(0), parts)[0], weight.sum()


def batch_loss(apply, params, batch, *, chunk: int, rngs=None):
    """Summed loss and weight of a batch, laid out as :mod:`peft_jax.data.batches` says."""
    hidden = apply({"params": params}, batch["input_ids"], positions=batch["positions"],
                   segment_ids=batch["segment_ids"], rngs=rngs, method="hidden")

    def head(states):
        return apply({"params": params}, states, rngs=rngs, method="head")

    return summed_loss(head, pick(hidden, batch["loss_index"]), batch["loss_target"], batch["loss_weight"], chunk)
