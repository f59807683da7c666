"""Evaluation against the plain way: whole logits, one example at a time, no batches."""

import copy
import math

import jax
import numpy as np
import pytest

from configs import base
from peft_jax.data import choice_tokens, encode_all, encode_prompts, prompt_batches
from peft_jax.evaluation.evaluate import complete, hold_out, make_evaluator, make_score, score_all
from peft_jax.evaluation.generation import generate
from peft_jax.evaluation.metrics import first_word, rating_metrics
from peft_jax.evaluation.objectives import OBJECTIVES
from peft_jax.parallel.mesh import make_mesh

REVIEWS = [("dull and far too long", -2.5), ("fine", 0.1), ("a bright film, good fun", 1.0),
           ("a great, great film", 3.0), ("no plot to speak of", -1.0)]  # fmt: skip
WORD_OF = {-2.5: "terrible", 0.1: "okay", 1.0: "good", 3.0: "great", -1.0: "bad"}
PROBE = [{"text": "the quick brown fox"}, {"text": "jumps over a lazy dog, and over another one"}, {"text": "good"}]


@pytest.fixture(scope="module")
def config():
    config = base.get_config()
    config.eval.update(batch_size=2, width_multiple=8, buckets=2)
    return config


@pytest.fixture(scope="module")
def examples():
    return [{"prompt": f"Review: {text}\nIn one word, the movie is", "completion": f" {WORD_OF[mean]}",
             "word": WORD_OF[mean], "score": mean} for text, mean in REVIEWS]  # fmt: skip


@pytest.fixture(scope="module")
def found(config, examples, tiny_model, tiny_tokenizer):
    model, params = tiny_model
    held = hold_out(examples, PROBE, tiny_tokenizer, config.task, config.data)
    return make_evaluator(model.apply, model, tiny_tokenizer, held, config)(params)


@pytest.fixture(scope="module")
def logprobs_of(tiny_model):
    """ids (n,) -> log-probabilities (n, vocab), one example at a time; what stands behind it changes nothing before."""
    model, params = tiny_model
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0]))
    return lambda ids: np.asarray(forward(np.pad(ids, (0, 128 - len(ids)))[None])[: len(ids)])


def mean_loss(logprobs_of, encoded):
    losses = []
    for one in encoded:
        logprobs = logprobs_of(one.input_ids)
        losses += [-logprobs[t - 1, one.input_ids[t]] for t in np.flatnonzero(one.loss_mask)]
    return float(np.mean(losses))


@pytest.mark.slow
def test_losses_equal_those_of_whole_logits(found, config, examples, logprobs_of, tiny_tokenizer):
    for name, given in (("", examples), ("probe_", PROBE)):
        expected = mean_loss(logprobs_of, encode_all(given, tiny_tokenizer, config.data)[0])
        assert found[f"{name}loss"] == pytest.approx(expected, rel=1e-4)
        assert found[f"{name}perplexity"] == pytest.approx(math.exp(expected), rel=1e-3)


def test_rating_metrics_equal_those_of_one_prompt_at_a_time(found, config, examples, logprobs_of, tiny_tokenizer):
    choices = choice_tokens([f" {word}" for word in config.task.words], examples[0]["prompt"], tiny_tokenizer)
    logprobs, words = [], []
    for ids in encode_prompts(examples, tiny_tokenizer):
        logprobs.append(logprobs_of(ids)[-1, choices])
        for _ in range(config.eval.max_new_tokens):  # greedy, without a cache
            ids = np.append(ids, logprobs_of(ids)[-1].argmax())
        words.append(first_word(tiny_tokenizer.decode(ids[-config.eval.max_new_tokens :], skip_special_tokens=True)))
    values = dict(zip(config.task.words, config.task.word_values, strict=True))
    expected = rating_metrics(np.array(logprobs), words, [e["word"] for e in examples], values,
                              np.array([e["score"] for e in examples]))  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5)


def test_choices_come_back_in_the_examples_order(config, examples, tiny_model, logprobs_of, tiny_tokenizer):
    model, params = tiny_model
    held = hold_out(examples, [], tiny_tokenizer, config.task, config.data)
    order = [one.example for one in held.encoded]
    assert order != sorted(order)  # the lengths of REVIEWS are mixed on purpose
    score = make_score(model.apply, config.optim.loss_chunk, OBJECTIVES["word"])
    _, logprobs = score_all(score, params, held.encoded, held.choices, config.eval, len(examples))
    for row, ids in zip(logprobs, held.prompts, strict=True):
        np.testing.assert_allclose(row, logprobs_of(ids)[-1, held.choices], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes, chunks", [((1, 1, 1), [[0, 1], [2, 3]]), ((2, 1, 1), [[0, 2], [1, 3]])])
def test_a_batch_on_a_mesh_is_cut_into_its_shards(sizes, chunks):
    """The head sees its chunk: it takes off the mean of the states that came with a state."""
    table = jax.random.normal(jax.random.key(0), (4, 5))
    batch = {"input_ids": np.arange(4)[:, None], "segment_ids": np.ones((4, 1), int),
             "positions": np.zeros((4, 1), int), "loss_index": np.zeros((4, 1), int),
             "loss_target": np.array([[1], [0], [3], [4]]), "loss_weight": np.ones((4, 1), np.float32)}

    def apply(variables, x, method, **batch):
        return variables["params"]["table"][x] if method == "hidden" else x - x.mean(0)

    found, weight, _ = make_score(apply, 2, OBJECTIVES["word"], make_mesh(*sizes))({"table": table}, batch, None)
    losses = [-jax.nn.log_softmax(table[np.array(chunk)] - table[np.array(chunk)].mean(0))[row, target]
              for chunk in chunks for row, target in enumerate(batch["loss_target"][chunk, 0])]
    assert (float(found), weight) == (pytest.approx(float(sum(losses)), rel=1e-5), 4)


@pytest.mark.slow
def test_continuations_come_back_in_the_prompts_order(examples, tiny_model, tiny_tokenizer):
    model, params = tiny_model
    prompts = encode_prompts(examples, tiny_tokenizer)
    options = {"width_multiple": 8, "max_new_tokens": 5}
    together = complete(model.apply, model, params, prompts, tiny_tokenizer, batch_size=2, **options)
    alone = [complete(model.apply, model, params, [p], tiny_tokenizer, batch_size=1, **options)[0] for p in prompts]
    assert together == alone


@pytest.mark.slow
def test_a_text_ends_at_the_chat_templates_end_of_a_turn(examples, tiny_model, tiny_tokenizer):
    """Whichever token that is: here the second that the model writes, which is then no part of the text."""
    model, params = tiny_model
    prompts, options = encode_prompts(examples[:1], tiny_tokenizer), {"width_multiple": 8, "max_new_tokens": 5}
    whole = generate(model.apply, model, params, **next(prompt_batches(prompts, 1, 8))[1], max_new_tokens=5,
                     stop_ids=(tiny_tokenizer.eos_token_id,))[0].tolist()
    assert whole[1] not in (whole[0], tiny_tokenizer.eos_token_id)
    end, chatty = tiny_tokenizer.convert_ids_to_tokens(whole[1]), copy.deepcopy(tiny_tokenizer)
    chatty.add_tokens([end])
    chatty.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '" + end + "' }}{% endfor %}"
    (text,) = complete(model.apply, model, params, prompts, chatty, batch_size=1, **options)
    assert text == tiny_tokenizer.decode(whole[:1])
