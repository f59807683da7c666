"""What a batch says of its rows: how many tokens each holds, or, where they are packed, which text each token is of."""

from collections.abc import Mapping
from typing import Any

import numpy as np

NAMES = ("lengths", "segment_ids")  # a batch has one of them; one without either has no padding


def arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a model's ``hidden`` that say it.

    >>> list(arguments({"input_ids": np.ones((2, 5)), "lengths": np.array([5, 3])}))
    ['lengths']
    """
    return {name: batch[name] for name in NAMES if name in batch}


def real_tokens(batch: Mapping[str, Any]) -> np.ndarray:
    """Which tokens (..., rows, tokens) of a batch of numpy arrays are no padding.

    >>> real_tokens({"input_ids": np.ones((2, 3), int), "lengths": np.array([3, 1])}).astype(int).tolist()
    [[1, 1, 1], [1, 0, 0]]
    """
    if "segment_ids" in batch:
        return np.asarray(batch["segment_ids"]) > 0
    ids = np.asarray(batch["input_ids"])
    return np.arange(ids.shape[-1]) < np.asarray(batch.get("lengths", ids.shape[-1]))[..., None] + np.zeros_like(ids)
