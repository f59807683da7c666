"""The loss where there is one, in chunks: (batch, seq, vocab) logits never exist at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from peft_jax.core import rows
from peft_jax.errors import PeftJaxError
from peft_jax.parallel.mesh import row_shards, rows_apart


def pick(hidden, index):
    """The hidden states (batch, n, hidden) at positions ``index`` int (batch, n) of (batch, seq, hidden)."""
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def cross_entropy(logits, target):
    """In nats, of classes int (n,) under logits (n, classes): (n,)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


def squared_error(logits, target):
    """Of numbers (n,) against the only output, (n, 1): (n,)."""
    return jnp.square(logits[..., 0] - target)


def summed_loss(head, hidden, target, weight, chunk: int, error=cross_entropy, shards: int = 1):
    """Weighted sum of the errors of answers, of token cross entropies in nats by default, and the sum of weights.

    The gradient is taken chunk by chunk on the way forward, while a chunk's logits are there: a sum's gradient needs
    nothing from later. So no logits are kept, and none are computed twice.

    Args:
      head: (tokens, hidden) -> logits (tokens, vocab); may close over traced parameters, which then get gradients.
      hidden: (batch, n, hidden). target: int or float32 (batch, n). weight: float32 (batch, n), 0 for padding.
      chunk: tokens whose logits exist at once.
      shards: parts that the batch lies in on a mesh: each chunk has as much of every one.
      error: (logits float32 (n, vocab), target (n,)) -> (n,).
    """
    shards = shards if len(target) % shards == 0 else 1
    chunk = -(-min(chunk, target.size) // shards) * shards
    example = jax.ShapeDtypeStruct((chunk, hidden.shape[-1]), hidden.dtype)
    pure, closed_over = jax.closure_convert(head, example)
    parts = (_chunks(x, chunk, shards) for x in (hidden, target, weight))
    return _total(pure, error, closed_over, *parts), weight.sum()


def _chunks(x, chunk, shards):
    """(batch, n, ...) -> (chunks, chunk, ...), zeros at the end of each shard."""
    rest = x.shape[2:]
    flat = x.reshape(shards, -1, *rest)
    fill = [(0, 0), (0, -flat.shape[1] % (chunk // shards))] + [(0, 0)] * len(rest)
    flat = jnp.pad(flat, fill).reshape(shards, -1, chunk // shards, *rest)
    return jnp.swapaxes(flat, 0, 1).reshape(-1, chunk, *rest)


def _chunk_loss(pure, error, states, closed_over, target, weight):
    return jnp.sum(error(pure(states, *closed_over).astype(jnp.float32), target) * weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(pure, error, closed_over, hidden, target, weight):
    def add(total, part):
        return total + _chunk_loss(pure, error, part[0], closed_over, *part[1:]), None

    return jax.lax.scan(add, jnp.float32(0), (hidden, target, weight))[0]


def _total_forward(pure, error, closed_over, hidden, target, weight):
    differentiated = jax.value_and_grad(partial(_chunk_loss, pure, error), (0, 1))

    def add(carry, part):
        total, gradient = carry
        loss, (by_state, by_leaf) = differentiated(part[0], closed_over, *part[1:])
        return (total + loss, jax.tree.map(jnp.add, gradient, by_leaf)), by_state

    start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, closed_over))
    (total, by_leaf), by_state = jax.lax.scan(add, start, (hidden, target, weight))
    return total, (by_leaf, by_state, target)


def _total_backward(pure, error, kept, cotangent):
    by_leaf, by_state, target = kept
    scale = partial(jax.tree.map, lambda x: x * cotangent.astype(x.dtype))
    real = jnp.issubdtype(target.dtype, jnp.floating)  # targets are data: no gradient, whatever their type
    no_gradient = jnp.zeros_like(target) if real else np.zeros(target.shape, jax.dtypes.float0)
    return scale(by_leaf), scale(by_state), no_gradient, jnp.zeros(target.shape, jnp.float32)


_total.defvjp(_total_forward, _total_backward)


def states_of(apply, params, batch, rngs=None):
    """What the model's ``hidden`` makes of a batch: (batch, seq, hidden).

    Raises ``PeftJaxError`` where the batch has ``lengths`` and the model does not take them.
    """
    try:
        return apply({"params": params}, batch["input_ids"], positions=batch["positions"], **rows.arguments(batch),
                     rngs=rngs, method="hidden")
    except TypeError as error:
        if "unexpected keyword argument 'lengths'" not in str(error):
            raise
        raise PeftJaxError("the model's hidden does not take lengths=, int (rows,), by which rows of one text each say "
                           "how many of their tokens are real: add it, or pack rows (data.collate=pack), whose batches "
                           "have segment_ids.") from error


def batch_loss(apply, params, batch, *, chunk: int, rngs=None, error=cross_entropy, mesh=None):
    """Summed loss and weight of a batch, laid out as :mod:`peft_jax.data.batches` says.

    The model has ``hidden`` and ``head``: what the head makes of the states at the tokens that the batch names is
    compared with the batch's targets by ``error``. On a ``mesh`` the rows stay split.
    """
    hidden = states_of(apply, params, batch, rngs)

    def head(states):
        return apply({"params": params}, rows_apart(mesh, states), rngs=rngs, method="head")

    picked = pick(hidden, batch["loss_index"])
    return summed_loss(head, picked, batch["loss_target"], batch["loss_weight"], chunk, error, row_shards(mesh))
