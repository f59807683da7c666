"""Texts with a label to be told, for models with a head: one answer for a text instead of the next tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peft_jax.data.sources import Example
from peft_jax.data.tokenize import Encoded, where_of
from peft_jax.errors import PeftJaxError


class Labelled(NamedTuple):
    """One text.

    input_ids: (n,) int32, special tokens included.
    label: the number of its class (int), or a rating (float).
    example: which example of the list it came from.
    """

    input_ids: np.ndarray
    label: int | float
    example: int = 0


def targets(one: Encoded | Labelled) -> tuple[np.ndarray, np.ndarray]:
    """(m,) tokens at which something is to be answered, and what: the next token, or at the first token the label."""
    if isinstance(one, Labelled):
        return np.zeros(1, np.int64), np.array([one.label], np.float32 if isinstance(one.label, float) else np.int32)
    answer = np.flatnonzero(one.loss_mask[1:])
    return answer, one.input_ids[answer + 1]


def encode_labelled(examples: Sequence[Example], tokenizer, config) -> tuple[list[Labelled], dict[str, int]]:
    """Tokenise texts (``"text"``) with their ``"label"`` as the model was pretrained to see them, and count.

    Args:
      config: ``max_length`` (tokens, 0: no limit) and ``on_too_long``: "error", "drop", or "truncate_left", which takes
        tokens off the start of the text.
    Returns:
      (texts in the order of ``examples``, counts as of :func:`peft_jax.data.encode_all`).
    Raises:
      PeftJaxError: names the example, its length, the limit and what to set; also where nothing is left.
    """
    if config.on_too_long == "split":
        raise PeftJaxError("data.on_too_long='split': a text with one label cannot be split: use truncate_left or drop")
    every = tokenizer([example["text"] for example in examples], verbose=False)["input_ids"]
    if not all(every):
        first = every.index([])
        raise PeftJaxError(f"{where_of(first, examples[first])} is a text of which this tokenizer makes no token: "
                           "leave it out")
    long = {i for i, ids in enumerate(every) if 0 < config.max_length < len(ids)}
    if long and config.on_too_long == "error":
        first = min(long)
        raise PeftJaxError(f"example {first} has {len(every[first])} tokens, more than data.max_length="
                           f"{config.max_length}; raise it or set data.on_too_long to truncate_left or drop")
    if long and config.on_too_long == "truncate_left":
        for i in long:
            every[i] = _cut(examples[i]["text"], tokenizer, config.max_length)
    dropped = long if config.on_too_long == "drop" else ()
    kept = [Labelled(np.asarray(every[i], np.int32), example["label"], i) for i, example in enumerate(examples)
            if i not in dropped]
    if not kept:
        raise PeftJaxError(f"none of {len(examples)} texts is left: all are longer than max_length={config.max_length}")
    lengths = [len(one.input_ids) for one in kept]
    return kept, {"examples": len(examples), "sequences": len(kept), "tokens": sum(lengths), "answer_tokens": len(kept),
                  "longest": max(lengths), "dropped": len(dropped), "truncated": len(long) - len(dropped), "split": 0}


def _cut(text: str, tokenizer, tokens: int) -> list[int]:
    """The ids of a text, its start taken off where they are more than ``tokens``; special ones stay."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        return tokenizer(text, truncation=True, max_length=tokens)["input_ids"]
    finally:
        tokenizer.truncation_side = side
