"""Metrics as pure functions of what a model gave: no model, no data set, no device."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.errors import PeftJaxError


def rating_metrics(
    choice_logprobs: np.ndarray,
    generated_words: Sequence[str],
    references: Sequence[str],
    choice_values: Mapping[str, float],
    human_means: np.ndarray,
) -> dict[str, float]:
    """Three views of "rate this in one word", so that learning the format is not mistaken for learning the task.

    Args:
      choice_logprobs: (n, k) log-probability of each choice word as the answer; rows need not sum to one.
      generated_words: n words that the model wrote when left free (``first_word`` of the text).
      references: n right words.
      choice_values: word -> rating, in the order of the columns of ``choice_logprobs``.
      human_means: (n,) mean human ratings.
    Returns:
      {"exact": share of generated words that are the right one, in [0, 1];
       "among_choices": share where the right word is the likeliest of the k, in [0, 1];
       "spearman": rank correlation of the expected rating with the human mean, in [-1, 1], see ``spearman``}.
    Raises:
      PeftJaxError: lengths differ, nothing to evaluate, a reference that is no choice, NaN among the log-probabilities.
    """
    logprobs, words = np.asarray(choice_logprobs, np.float64), list(choice_values)
    _check_ratings(logprobs, generated_words, references, words, human_means)
    right = np.array([words.index(word) for word in references])
    return {
        "exact": float(np.mean([g == r for g, r in zip(generated_words, references, strict=True)])),
        "among_choices": float(np.mean(logprobs.argmax(axis=1) == right)),
        "spearman": spearman(expected_rating(logprobs, list(choice_values.values())), human_means),
    }


def _check_ratings(logprobs: np.ndarray, generated_words: Sequence[str], references: Sequence[str],
                   words: Sequence[str], human_means: np.ndarray) -> None:  # fmt: skip
    sizes = {len(logprobs), len(generated_words), len(references), len(human_means)}
    if len(sizes) > 1 or sizes == {0} or logprobs.shape[1:] != (len(words),):
        raise PeftJaxError(
            f"cannot compare {logprobs.shape} log-probabilities, {len(generated_words)} generated words, "
            f"{len(references)} references and {len(human_means)} human means over {len(words)} choices"
        )
    if np.isnan(logprobs).any():
        raise PeftJaxError(
            "the model's log-probabilities of the choices contain NaN: the model is broken, not merely wrong"
        )
    if unknown := sorted(set(references) - set(words)):
        raise PeftJaxError(f"the references {unknown} are not among the choices {words}")


def class_metrics(logprobs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """{"accuracy": share where the right class is the likeliest, in [0, 1]}, of (n, k) and (n,) the right classes.

    Raises ``PeftJaxError`` for NaN among the log-probabilities.
    """
    if np.isnan(logprobs).any():
        raise PeftJaxError("the model's log-probabilities of the classes contain NaN: the model is broken, not wrong")
    return {"accuracy": float(np.mean(np.argmax(logprobs, axis=1) == labels))}


def expected_rating(choice_logprobs: np.ndarray, values: Sequence[float]) -> np.ndarray:
    """(n,) mean rating under the probabilities renormalised over the k choices. (n, k), (k,) -> (n,)."""
    weights = np.exp(choice_logprobs - np.max(choice_logprobs, axis=1, keepdims=True))
    return weights @ np.asarray(values, np.float64) / weights.sum(axis=1)


def spearman(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Spearman's rank correlation with mean ranks for ties (scipy's ``spearmanr``). (n,), (n,) -> [-1, 1].

    Constant predictions give 0: they order nothing, which is what chance gives, and a training run must be able to log
    it. Constant targets or fewer than two of them give NaN: there is no order to find.
    """
    if np.unique(targets).size < 2:
        return math.nan
    if np.unique(predictions).size < 2:
        return 0.0
    from scipy.stats import spearmanr  # a second of imports, which only ratings need

    correlation: Any = spearmanr(predictions, targets)[0]
    return float(np.clip(correlation, -1.0, 1.0))


def first_word(text: str) -> str:
    """The first word of generated text, without case or punctuation around it; "" where there is none.

    >>> first_word('  "Great", I think')
    'great'
    """
    words = text.split()
    return words[0].strip(".,;:!?\"'*()[]`").lower() if words else ""
