"""What a task asks of a model: to write the answer, to tell its class, or to give a number.

Training and evaluation know no more of a task than this: its head, its encoding, the loss at the tokens that a batch
names, and what is read there.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.data import encode_all
from peft_jax.data.labelled import encode_labelled
from peft_jax.evaluation.metrics import class_metrics, expected_rating, first_word, rating_metrics, spearman
from peft_jax.models import Head
from peft_jax.train.loss import cross_entropy, squared_error


class Objective(NamedTuple):
    """One way of answering.

    Fields:
      head: ``task -> Head``, ``None`` for the language model's own.
      encode: ``(examples, tokenizer, data config) -> (encoded, counts)``.
      error: ``(logits (n, k), target (n,)) -> (n,)``, the loss of each answer.
      read: ``logits (n, k) -> (n, k)``, what the metrics are made of.
      rate: ``(task, examples, answers (n, k), texts) -> metrics``; ``texts`` are what the model wrote.
      losses: ``mean loss -> metrics``.
      tell: ``(answers (n, k), names of the classes) -> texts``, what a head says of each example, for people.
      writes: whether the answer is text.
    """

    head: Callable[[Any], Head | None]
    encode: Callable[..., tuple[list, dict[str, int]]]
    error: Callable[..., jax.Array]
    read: Callable[[jax.Array], jax.Array]
    rate: Callable[..., dict[str, float]]
    losses: Callable[[float], dict[str, float]]
    tell: Callable[..., list[str]]
    writes: bool


def _log_softmax(logits):
    return jax.nn.log_softmax(logits.astype("float32"))


def _numbers(logits):
    return logits.astype("float32")


def _means(examples) -> np.ndarray:
    return np.array([example["score"] for example in examples])


def _rate_words(task, examples, answers, texts) -> dict[str, float]:
    values = dict(zip(task.words, task.word_values, strict=True))
    return rating_metrics(answers, [first_word(text) for text in texts], [example["word"] for example in examples],
                          values, _means(examples))


def _rate_classes(task, examples, answers, texts) -> dict[str, float]:
    found = class_metrics(answers, _labels(examples))
    if task.kind == "rating":  # its classes have an order
        found["spearman"] = spearman(expected_rating(answers, task.word_values), _means(examples))
    return found


def _rate_numbers(task, examples, answers, texts) -> dict[str, float]:
    return {"spearman": spearman(answers[:, 0], _labels(examples))}


def _tell_classes(answers: np.ndarray, names: Sequence[str]) -> list[str]:
    """The likeliest class of each row of log-probabilities, and how likely it is."""
    best = answers.argmax(axis=1)
    return [f"{names[i] if names else i} ({math.exp(row[i]):.3f})" for i, row in zip(best, answers, strict=True)]


def _tell_numbers(answers: np.ndarray, names: Sequence[str]) -> list[str]:
    return [f"{number:.3f}" for number in answers[:, 0]]


def _labels(examples) -> np.ndarray:
    return np.array([example["label"] for example in examples])


def class_names(task) -> tuple[str, ...]:
    """What the classes of a task are called, by number; () where a head tells none, or they have numbers alone."""
    if task.answer != "class":
        return ()
    return tuple(task.words if task.kind == "rating" else task.label_names)


def _classes(task) -> Head:
    names = class_names(task)
    return Head("SEQ_CLS", len(names) or task.num_labels, task.pooling, names)


def _word_losses(loss: float) -> dict[str, float]:
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


OBJECTIVES = {
    "word": Objective(lambda task: None, encode_all, cross_entropy, _log_softmax, _rate_words, _word_losses,
                      lambda answers, names: [], True),
    "class": Objective(_classes, encode_labelled, cross_entropy, _log_softmax, _rate_classes,
                       lambda loss: {"text_loss": loss}, _tell_classes, False),
    "score": Objective(lambda task: Head("SEQ_CLS", 1, task.pooling), encode_labelled, squared_error, _numbers,
                       _rate_numbers, lambda loss: {"rmse": math.sqrt(loss)}, _tell_numbers, False),
}  # fmt: skip


def objective_of(task) -> Objective:
    """The objective of ``config.task``."""
    return OBJECTIVES[task.answer]
