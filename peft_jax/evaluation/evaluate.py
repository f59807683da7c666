"""What a model does on held-out data: loss, the task's own metrics, and loss on general text to see forgetting."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from peft_jax.core import tree
from peft_jax.data import choice_tokens, encode_all, encode_prompts, eval_batches, prompt_batches
from peft_jax.data.batches import One
from peft_jax.data.sources import Example
from peft_jax.evaluation.generation import GREEDY, Sampling, generate
from peft_jax.evaluation.objectives import Objective, objective_of
from peft_jax.evaluation.unpacking import as_chosen
from peft_jax.hub.chat_template import stops
from peft_jax.parallel.mesh import feed, fetch, row_shards, rows_apart
from peft_jax.train.loss import pick, states_of, summed_loss
from peft_jax.train.progress import watched


class HeldOut(NamedTuple):
    """Held-out data, tokenised once.

    examples: as loaded. encoded: their token ids, longest last, ``example`` says which. prompts: ids of each question.
    choices: (k,) which outputs are the task's answers, ``None`` where it has none to compare: the first tokens of its
    words, or all outputs of its head. probe: general text.
    """

    examples: Sequence[Example]
    encoded: Sequence[One]
    prompts: Sequence[np.ndarray]
    choices: np.ndarray | None
    probe: Sequence[One]


def hold_out(examples: Sequence[Example], probe: Sequence[Example], tokenizer, task, data) -> HeldOut:
    """Tokenise held-out examples of ``config.task`` and general text as ``config.data`` says."""
    objective, rating = objective_of(task), task.kind == "rating"
    return HeldOut(
        examples,
        _by_length(objective.encode(examples, tokenizer, data)[0]),
        encode_prompts(examples, tokenizer) if rating and objective.writes else [],
        _choices(objective, examples, tokenizer, task) if rating or not objective.writes else None,
        _by_length(encode_all(probe, tokenizer, data)[0]) if probe else [],
    )


def _choices(objective: Objective, examples: Sequence[Example], tokenizer, task) -> np.ndarray:
    if (head := objective.head(task)) is not None:
        return np.arange(head.num_labels)
    words = [task.completion_template.replace("{word}", word) for word in task.words]
    return choice_tokens(words, examples[0]["prompt"], tokenizer)


def _by_length(encoded: Sequence[One]) -> list[One]:
    """Short ones first: a batch then holds like lengths, and a few widths serve all batches."""
    return sorted(encoded, key=lambda one: len(one.input_ids))


def make_evaluator(apply: Callable, model, tokenizer, held: HeldOut, config, mesh: Mesh | None = None,
                   dequantize: str = "auto") -> Callable[[tree.Tree], dict[str, float]]:
    """``evaluate(params) -> metrics``, compiled once however often it is called.

    Args:
      apply: ``model.apply`` or ``peft_jax.bind(method, model)``.
      config: the whole configuration; ``task``, ``eval`` and ``optim.loss_chunk`` are read.
      mesh: on which the parameters lie.
      dequantize: as of :func:`peft_jax.generate`.

    The metrics are those of the task's objective (:mod:`peft_jax.evaluation.objectives`), its loss among them;
    ``probe_loss`` and ``probe_perplexity`` where there is general text.
    """
    evaluate = make_evaluator_of_any(apply, model, tokenizer, config, mesh, dequantize)
    return lambda params: evaluate(params, held, config.task)


def make_evaluator_of_any(apply: Callable, model, tokenizer, config, mesh: Mesh | None = None,
                          dequantize: str = "auto") -> Callable:
    """``evaluate(params, held, task) -> metrics`` as of :func:`make_evaluator`, for more than one task of the objective
    of ``config.task``: what is alike in their batches is compiled once."""
    objective = objective_of(config.task)
    score = make_score(apply, config.optim.loss_chunk, objective, mesh)

    def evaluate(params: tree.Tree, held: HeldOut, task) -> dict[str, float]:
        found: dict[str, float] = {}
        loss, answers = score_all(score, params, held.encoded, held.choices, config.eval, len(held.examples))
        if held.choices is not None:
            texts = complete(apply, model, params, held.prompts, tokenizer, batch_size=config.eval.batch_size,
                             width_multiple=config.eval.width_multiple, max_new_tokens=config.eval.max_new_tokens,
                             mesh=mesh, dequantize=dequantize)
            found |= _rate(objective, task, held.examples, answers, texts)
        found |= objective.losses(loss)
        if held.probe:
            loss, _ = score_all(score, params, held.probe, None, config.eval, len(held.probe))
            found |= {f"probe_{name}": value for name, value in objective.losses(loss).items()}
        return found

    return evaluate


def make_score(apply: Callable, loss_chunk: int, objective: Objective, mesh: Mesh | None = None) -> Callable:
    """``score(params, batch, choices) -> (summed loss, weight, answers (batch, k))``, jitted, of a numpy batch.

    ``answers`` are what ``objective`` reads of the outputs ``choices`` (k,) at the first answer of each row: their
    log-probabilities, or a number; ``None`` without choices.
    """

    @jax.jit
    def score(params, batch, choices):
        def head(states):
            return apply({"params": params}, rows_apart(mesh, states), method="head")

        picked = pick(states_of(apply, params, batch), batch["loss_index"])
        loss, weight = summed_loss(head, picked, batch["loss_target"], batch["loss_weight"], loss_chunk,
                                   objective.error, row_shards(mesh))
        if choices is None:
            return loss, weight, None
        return loss, weight, objective.read(head(picked[:, 0]))[:, choices]

    return lambda params, batch, choices: jax.tree.map(fetch, score(params, feed(mesh, batch), choices))


def score_all(score, params, encoded, choices, config, count) -> tuple[float, np.ndarray | None]:
    """(mean loss over all answers, what was read of them (count, k) in the examples' order)."""
    total, weight = 0.0, 0.0
    answers = None if choices is None else np.full((count, len(choices)), np.nan)
    batches = watched(eval_batches(encoded, config), -(-len(encoded) // config.batch_size), "evaluating")
    for number, batch in enumerate(batches):
        loss, tokens, found = score(params, batch, choices)
        total, weight = total + float(loss), weight + float(tokens)
        if answers is not None:
            rows = [one.example for one in encoded[number * config.batch_size:][:config.batch_size]]
            answers[rows] = found[:len(rows)]
    return total / weight, answers


def _rate(objective, task, examples, answers, texts) -> dict[str, float]:
    scored = ~np.isnan(answers).all(axis=1)  # an example longer than data.max_length may have been left out
    kept = [i for i in range(len(examples)) if scored[i]]
    written = [texts[i] for i in kept] if texts else []
    return objective.rate(task, [examples[i] for i in kept], answers[kept], written)


def complete(apply: Callable, model, params: tree.Tree, prompts: Sequence[np.ndarray], tokenizer: Any, *,
             batch_size: int, width_multiple: int, max_new_tokens: int, sampling: Sampling = GREEDY,
             rng: jax.Array | None = None, mesh: Mesh | None = None, dequantize: str = "auto") -> list[str]:
    """The continuation of each prompt (n,) int32 as text without special tokens, up to the tokenizer's end token or
    its chat template's end of a turn.

    Other arguments as of :func:`peft_jax.generate`; a quantised base is made plain once, for all batches.
    """
    texts, ends = [""] * len(prompts), stops(tokenizer).ids
    params = as_chosen(dequantize, model, params, mesh) if prompts else params
    batches = watched(prompt_batches(prompts, batch_size, width_multiple), -(-len(prompts) // batch_size), "writing")
    for batch_number, (members, batch) in enumerate(batches):
        key = None if rng is None else jax.random.fold_in(rng, batch_number)
        tokens = generate(apply, model, params, **batch, max_new_tokens=max_new_tokens,
                          stop_ids=ends, sampling=sampling, rng=key, mesh=mesh,
                          dequantize="never")
        for member, row in zip(members, tokens, strict=True):
            if member >= 0:
                texts[member] = tokenizer.decode(_until(row, ends), skip_special_tokens=True)
    return texts


def _until(row: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """The tokens of a row before the first of ``ends``, which not every tokenizer counts among its special ones."""
    return row[:np.append(np.flatnonzero(np.isin(row, ends)), len(row))[0]]
