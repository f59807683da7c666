"""How long a model takes to read a prompt and to write a token, and what a method adds to that."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.generation import GREEDY, decode

NEVER = np.array([-1])  # no token has this id: rows go on to the end


def latency(variants: Mapping[str, tuple[Callable, Any]], model: Any, *, prompt_tokens: int, new_tokens: int,
            rows: int = 1, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Seconds of prefill and of each decoded token, greedy, with the cache.

    Args:
      variants: ``{name: (apply, params)}``; ``apply`` is ``model.apply`` or a bound one.
      prompt_tokens, rows: of the prompt. new_tokens: over which decoding is averaged. repeats: all variants in turn.

    Returns ``{name: {"prefill": median seconds until the first new token, "token": those of each after it}}``, without
    what it takes to compile. Raises ``PeftJaxError`` for counts below 1, and more tokens than positions.
    """
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rows": rows, "repeats": repeats}
    if odd := [name for name, count in counts.items() if count < 1]:
        raise PeftJaxError(f"latency: {odd[0]}={counts[odd[0]]}: must be at least 1.")
    if prompt_tokens + new_tokens + 1 > (most := model.config.max_position_embeddings):
        raise PeftJaxError(f"latency: {prompt_tokens} prompt tokens and {new_tokens + 1} new ones are more than the "
                           f"model's {most} positions: lower one of them.")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, prompt_tokens)).astype(np.int32)
    taken = {name: {"prefill": [], "all": []} for name in variants}
    for turn in range(repeats + 1):
        for name, (apply, params) in variants.items():
            for what, new in (("prefill", 1), ("all", 1 + new_tokens)):
                seconds = _seconds(apply, params, ids, new)
                taken[name][what] += [seconds] if turn else []  # the first one compiles
    median = {name: {what: statistics.median(each) for what, each in found.items()} for name, found in taken.items()}
    return {name: {"prefill": one["prefill"], "token": (one["all"] - one["prefill"]) / new_tokens}
            for name, one in median.items()}


def _seconds(apply, params, ids, new: int) -> float:
    began = time.perf_counter()
    tokens = decode(apply, params, ids, np.ones_like(ids), NEVER, jax.random.key(0), max_new_tokens=new,
                    sampling=GREEDY)
    jax.block_until_ready(tokens)
    return time.perf_counter() - began
