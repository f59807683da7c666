"""What a model does on held-out data: loss, the task's own metrics, and loss on general text to see forgetting."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax import tree
from peft_jax.data import Encoded, choice_tokens, encode_all, encode_prompts, eval_batches, prompt_batches
from peft_jax.data.sources import Example
from peft_jax.evaluation.metrics import first_word, rating_metrics
from peft_jax.generation import GREEDY, Sampling, generate
from peft_jax.loss import pick, summed_loss


class HeldOut(NamedTuple):
    """Held-out data, tokenised once.

    examples: as loaded. encoded: their token ids, longest last, ``example`` says which. prompts: ids of each question.
    choices: (k,) the first tokens of the task's answer words, ``None`` where the task has none. probe: general text.
    """

    examples: Sequence[Example]
    encoded: Sequence[Encoded]
    prompts: Sequence[np.ndarray]
    choices: np.ndarray | None
    probe: Sequence[Encoded]


def hold_out(examples: Sequence[Example], probe: Sequence[Example], tokenizer, task, data) -> HeldOut:
    """Tokenise held-out examples of ``config.task`` and general text as ``config.data`` says."""
    rating = task.kind == "rating"
    words = [task.completion_template.replace("{word}", word) for word in task.words] if rating else []
    return HeldOut(
        examples,
        _by_length(encode_all(examples, tokenizer, data)[0]),
        encode_prompts(examples, tokenizer) if rating else [],
        choice_tokens(words, examples[0]["prompt"], tokenizer) if rating else None,
        _by_length(encode_all(probe, tokenizer, data)[0]) if probe else [],
    )


def _by_length(encoded: list[Encoded]) -> list[Encoded]:
    """Short ones first: a batch then holds like lengths, and a few widths serve all batches."""
    return sorted(encoded, key=lambda one: len(one.input_ids))


def make_evaluator(apply: Callable, model, tokenizer, held: HeldOut, config) -> Callable[[tree.Tree], dict[str, float]]:
    """``evaluate(params) -> metrics``, compiled once however often it is called.

    Args:
      apply: ``model.apply`` or ``peft_jax.bind(method, model)``.
      config: the whole configuration; ``task``, ``eval`` and ``optim.loss_chunk`` are read.

    The metrics: ``loss`` in nats per answer token and ``perplexity``; ``probe_loss`` and ``probe_perplexity`` where
    there is general text; for rating tasks those of :func:`peft_jax.evaluation.metrics.rating_metrics`.
    """
    score = make_score(apply, config.optim.loss_chunk)

    def evaluate(params: tree.Tree) -> dict[str, float]:
        found: dict[str, float] = {}
        loss, logprobs = score_all(score, params, held.encoded, held.choices, config.eval, len(held.examples))
        if held.choices is not None:
            texts = complete(apply, model, params, held.prompts, tokenizer, batch_size=config.eval.batch_size,
                             width_multiple=config.eval.width_multiple, max_new_tokens=config.eval.max_new_tokens)
            found |= _rate(config.task, held.examples, logprobs, texts)
        found |= {"loss": loss, "perplexity": _exp(loss)}
        if held.probe:
            loss, _ = score_all(score, params, held.probe, None, config.eval, len(held.probe))
            found |= {"probe_loss": loss, "probe_perplexity": _exp(loss)}
        return found

    return evaluate


def make_score(apply: Callable, loss_chunk: int) -> Callable:
    """A jitted ``score(params, batch, choices) -> (summed loss, weight, logprobs (batch, k))``.

    ``logprobs`` are of the tokens ``choices`` (k,) as the first answer token of each row, ``None`` without choices.
    """

    @jax.jit
    def score(params, batch, choices):
        def head(states):
            return apply({"params": params}, states, method="head")

        hidden = apply({"params": params}, batch["input_ids"], positions=batch["positions"],
                       segment_ids=batch["segment_ids"], method="hidden")
        picked = pick(hidden, batch["loss_index"])
        loss, weight = summed_loss(head, picked, batch["loss_target"], batch["loss_weight"], loss_chunk)
        if choices is None:
            return loss, weight, None
        return loss, weight, jax.nn.log_softmax(head(picked[:, 0]).astype("float32"))[:, choices]

    return score


def score_all(score, params, encoded, choices, config, count) -> tuple[float, np.ndarray | None]:
    """(mean loss over all answer tokens, log-probabilities (count, k) in the examples' order)."""
    total, weight = 0.0, 0.0
    logprobs = None if choices is None else np.full((count, len(choices)), np.nan)
    for number, batch in enumerate(eval_batches(encoded, config)):
        loss, tokens, found = score(params, batch, choices)
        total, weight = total + float(loss), weight + float(tokens)
        if choices is not None:
            rows = [one.example for one in encoded[number * config.batch_size:][:config.batch_size]]
            logprobs[rows] = found[:len(rows)]
    return total / weight, logprobs


def _rate(task, examples, logprobs, texts) -> dict[str, float]:
    scored = ~np.isnan(logprobs).all(axis=1)  # an example longer than data.max_length may have been left out
    kept = [i for i in range(len(examples)) if scored[i]]
    return rating_metrics(
        logprobs[kept],
        [first_word(texts[i]) for i in kept],
        [examples[i]["word"] for i in kept],
        dict(zip(task.words, task.word_values, strict=True)),
        np.array([examples[i]["score"] for i in kept]),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def complete(apply: Callable, model, params: tree.Tree, prompts: Sequence[np.ndarray], tokenizer: Any, *,
             batch_size: int, width_multiple: int, max_new_tokens: int, sampling: Sampling = GREEDY,
             rng: jax.Array | None = None) -> list[str]:
    """The continuation of each prompt (n,) int32 as text without special tokens, up to the tokenizer's end token."""
    texts = [""] * len(prompts)
    for batch_number, (members, batch) in enumerate(prompt_batches(prompts, batch_size, width_multiple)):
        key = None if rng is None else jax.random.fold_in(rng, batch_number)
        tokens = generate(apply, model, params, **batch, max_new_tokens=max_new_tokens,
                          stop_ids=(tokenizer.eos_token_id,), sampling=sampling, rng=key)
        for member, row in zip(members, tokens, strict=True):
            if member >= 0:
                texts[member] = tokenizer.decode(row, skip_special_tokens=True)
    return texts
