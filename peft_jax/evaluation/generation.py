"""Decoding with the cache: greedy or sampled, jitted once for a shape, prompts of unequal length padded on the left."""

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from peft_jax.core import arguments, validation
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.unpacking import as_chosen
from peft_jax.parallel.mesh import feed, fetch


class Sampling(NamedTuple):
    """How the next token is drawn; ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


GREEDY = Sampling()


def draw(logits, rng, sampling: Sampling):
    """The next tokens int32 (batch,) from ``logits`` (batch, vocab): temperature, then top-k, then top-p, as in HF."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = jnp.where(_outside_nucleus(logits, sampling.top_p), -jnp.inf, logits)
    return jax.random.categorical(rng, logits).astype(jnp.int32)


def _outside_nucleus(logits, top_p):
    """True for tokens after the smallest set of likeliest ones that holds ``top_p`` of the probability."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    return jnp.take_along_axis(before >= top_p, jnp.argsort(order, axis=-1), axis=-1)


@partial(jax.jit, static_argnames=("apply", "max_new_tokens", "sampling"))
def decode(apply: Callable, params, input_ids, attention_mask, stop_ids, rng, *, max_new_tokens: int,
           sampling: Sampling):
    """New tokens int32 (batch, max_new_tokens), ``stop_ids[0]`` after a row's first stop token.

    ``apply`` is ``model.apply`` or a bound one, whose cache a method may fill; the loop ends as soon as every row has
    stopped.
    """

    def forward(cache, ids, mask):
        hidden, changed = apply({"params": params, "cache": cache}, ids, mask, method="hidden", mutable=["cache"])
        return changed["cache"], apply({"params": params}, hidden[:, -1], method="head")

    def write(tokens, done, logits, at):
        token = jnp.where(done, stop_ids[0], draw(logits, jax.random.fold_in(rng, at), sampling))
        return tokens.at[:, at].set(token), done | jnp.isin(token, stop_ids), token

    def more(carry):
        return (carry[0] < max_new_tokens) & ~carry[2].all()

    def step(carry):
        at, tokens, done, token, cache = carry
        cache, logits = forward(cache, token[:, None], jnp.ones_like(token[:, None]))
        tokens, done, token = write(tokens, done, logits, at)
        return at + 1, tokens, done, token, cache

    batch, length = input_ids.shape
    cache = apply({"params": params}, batch, length + max_new_tokens, method="init_cache")
    tokens = jnp.full((batch, max_new_tokens), stop_ids[0], jnp.int32)
    cache, logits = forward(cache, input_ids, attention_mask)
    tokens, done, token = write(tokens, jnp.zeros(batch, bool), logits, 0)
    return jax.lax.while_loop(more, step, (jnp.int32(1), tokens, done, token, cache))[1]


def generate(apply: Callable, model, params, input_ids, attention_mask, *, max_new_tokens: int,
             stop_ids: tuple[int, ...], sampling: Sampling = GREEDY, rng: jax.Array | None = None,
             mesh: Mesh | None = None, dequantize: str = "auto") -> np.ndarray:
    """Continue prompts.

    Args:
      apply: ``model.apply`` or ``peft_jax.bind(method, model)``; keep one object across calls, it is the jit key.
      input_ids, attention_mask: int (batch, seq), padded on the left.
      mesh: on which the parameters lie, if that is of several devices.
      stop_ids: tokens that end a row, such as :func:`peft_jax.hub.chat_template.stops` finds; rows are filled with the
        first of them afterwards.
      dequantize: of a quantised base, whether its weights are made plain for this call, in the type that is computed
        in, so that not every token decodes them again: "auto" does so where they fit the memory that is free, "always",
        "never". Only the order of sums may differ, so a token only where two are equally likely.

    Returns int32 (batch, max_new_tokens). Raises ``PeftJaxError`` for inputs of another type or shape, ids outside the
    vocabulary, padding on the right, no stop token, a draw without ``rng``, a ``sampling`` out of range, another word
    for ``dequantize``, more tokens than the model has positions, or a model that has no cache.
    """
    arguments.check("generate", {"apply": apply, "model": model, "params": params})
    arguments.check("generate", {"rng": rng, "mesh": mesh}, optional=("rng", "mesh"))
    _check_arrays(input_ids, attention_mask)
    ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
    _check_inputs(model, ids, mask)
    _check_length(model, mask.shape[1], max_new_tokens)
    if stop_ids is None:
        raise PeftJaxError("generate: stop_ids=None: give at least one token id, such as (tokenizer.eos_token_id,).")
    validation.check_ids("generate: stop_ids", stop_ids)
    _check_sampling(sampling, rng)
    rng = jax.random.key(0) if rng is None else rng
    rows = feed(mesh, {"input_ids": ids, "attention_mask": mask})
    params = as_chosen(dequantize, model, params, mesh)
    tokens = decode(apply, params, **rows, stop_ids=np.asarray(stop_ids), rng=rng, max_new_tokens=max_new_tokens,
                    sampling=sampling)
    return fetch(tokens)


def _check_arrays(input_ids, attention_mask) -> None:
    for name, value in {"input_ids": input_ids, "attention_mask": attention_mask}.items():
        if not isinstance(value, list | tuple) and not hasattr(value, "shape"):
            raise PeftJaxError(f"generate: {name} is {arguments.described(value)}: give integers (batch, seq).")


def _check_inputs(model, ids: np.ndarray, mask: np.ndarray) -> None:
    if not hasattr(model, "init_cache"):
        raise PeftJaxError(f"generate: this {type(model).__name__} has no cache: only a decoder writes text.")
    if ids.ndim != 2 or ids.shape != mask.shape or not np.issubdtype(ids.dtype, np.integer):
        raise PeftJaxError(f"generate: input_ids are {ids.dtype} {ids.shape} and attention_mask {mask.shape}: give "
                           "integers (batch, seq), and a mask of that shape.")
    if mask.size == 0 or not mask[:, -1].all():
        raise PeftJaxError("generate: prompts must be padded on the left, and none may be empty; attention_mask ends "
                           "in 0 in some row.")
    last = model.config.vocab_size - 1
    if odd := ids[(ids < 0) | (ids > last)].tolist():
        raise PeftJaxError(f"generate: input_ids has {odd[0]}, the vocabulary is 0 to {last}: take the ids, of padding "
                           "too, from the model's own tokenizer.")


def _check_length(model, length: int, new) -> None:
    most = model.config.max_position_embeddings
    if not isinstance(new, Integral) or isinstance(new, bool) or new < 1:
        raise PeftJaxError(f"generate: max_new_tokens={new!r}: give a whole number of at least 1.")
    if length + new > most:
        raise PeftJaxError(f"generate: {length} prompt tokens and {new} new ones are more than the model's {most} "
                           "positions: shorten one of them.")


def _check_sampling(sampling: Sampling, rng) -> None:
    if not isinstance(sampling, Sampling):
        raise PeftJaxError(f"generate: sampling is {arguments.described(sampling)}: give "
                           "peft_jax.Sampling(temperature=0.7).")
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise PeftJaxError(f"generate: {sampling}: temperature and top_k are at least 0, top_p above 0 and at most 1.")
    if sampling.temperature and rng is None:
        raise PeftJaxError("generate: a temperature above 0 draws tokens: give rng=jax.random.key(seed).")
