"""Classifiers and regressions: loss, metrics and gradients against the plain way, one text at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from peft_jax import bind, combine, flatten, lora, partition
from peft_jax.data import Batches
from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.evaluate import hold_out, make_evaluator
from peft_jax.evaluation.metrics import class_metrics, spearman
from peft_jax.evaluation.objectives import objective_of
from peft_jax.models import Encoder, EncoderConfig
from peft_jax.train.step import init_state, make_step

TEXTS = ["dull and far too long", "fine", "a bright film, good fun", "a great, great film", "no plot to speak of"]
MEANS = [-2.5, 0.1, 1.0, 3.0, -1.0]


def setting(tokenizer, answer, pooling):
    """(config, examples, model, params)."""
    config = base.get_config(task={"class": "movie_classes", "score": "movie_score"}[answer])
    config.task.pooling = pooling
    config.eval.update(batch_size=2, width_multiple=8, buckets=2)
    labels = [0, 2, 3, 4, 1] if answer == "class" else MEANS
    words = [config.task.words[i] for i in (0, 2, 3, 4, 1)]
    examples = [{"text": text, "label": label, "word": word, "score": mean}
                for text, label, word, mean in zip(TEXTS, labels, words, MEANS)]
    sizes = EncoderConfig(len(tokenizer), 16, 24, 2, 4, 64, head=objective_of(config.task).head(config.task))
    model = Encoder(sizes)
    return config, examples, model, model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]


def alone(model, params, tokenizer):
    """(n, labels) outputs, one text at a time."""
    return jnp.concatenate([model.apply({"params": params}, np.array([tokenizer(text)["input_ids"]]))
                            for text in TEXTS])


def plain_loss(outputs, examples, answer):
    labels = np.array([example["label"] for example in examples])
    if answer == "score":
        return jnp.mean((outputs[:, 0] - labels) ** 2)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


@pytest.mark.slow
@pytest.mark.parametrize("answer, pooling", [("class", "mean"), ("class", "first"), ("score", "first")])
def test_evaluation_is_that_of_single_texts(tiny_tokenizer, answer, pooling):
    config, examples, model, params = setting(tiny_tokenizer, answer, pooling)
    held = hold_out(examples, [], tiny_tokenizer, config.task, config.data)
    found = make_evaluator(model.apply, model, tiny_tokenizer, held, config)(params)
    outputs = np.asarray(alone(model, params, tiny_tokenizer))
    loss = float(plain_loss(outputs, examples, answer))
    if answer == "class":
        weights = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        assert found == pytest.approx({
            "accuracy": np.mean(outputs.argmax(1) == [0, 2, 3, 4, 1]), "text_loss": loss,
            "spearman": spearman(weights @ np.array(config.task.word_values), np.array(MEANS))}, rel=1e-4)
    else:
        assert found == pytest.approx({"rmse": loss**0.5, "spearman": spearman(outputs[:, 0], np.array(MEANS))}, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("answer, pooling", [("class", "mean"), ("score", "first")])
def test_a_packed_training_step_has_the_gradient_of_single_texts(tiny_tokenizer, answer, pooling):
    config, examples, model, base_params = setting(tiny_tokenizer, answer, pooling)
    method = lora(r=2, target_modules=("query", "value"), modules_to_save=("classifier",), init_lora_weights=False)
    params = method.init(jax.random.key(1), base_params)
    trainable, frozen = partition(params, method.labels(params))
    assert "classifier/kernel" in flatten(trainable) and "encoder/layer/attention/self/query/kernel" in flatten(frozen)
    config.data.update(batch_size=5, rows=2)
    encoded, _ = objective_of(config.task).encode(examples, tiny_tokenizer, config.data)
    batch = {name: array[None] for name, array in Batches(encoded, config.data).at(0).items()}
    step = make_step(bind(method, model), optax.sgd(1.0), 3, objective_of(config.task).error)
    state, metrics = step(init_state(trainable, optax.sgd(1.0), jax.random.key(0)), frozen, batch)

    def loss(leaves):
        tuned = combine(frozen, leaves)
        outputs = [bind(method, model)({"params": tuned}, np.array([tiny_tokenizer(text)["input_ids"]]))
                   for text in TEXTS]
        return plain_loss(jnp.concatenate(outputs), examples, answer)

    expected, gradient = jax.jit(jax.value_and_grad(loss))(trainable)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    most = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for path, leaf in flatten(gradient).items():
        moved = flatten(trainable)[path] - flatten(state.trainable)[path]
        np.testing.assert_allclose(moved, leaf, rtol=1e-3, atol=1e-5 * most, err_msg=path)


@pytest.mark.slow
def test_class_metrics():
    logprobs = np.log([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    assert class_metrics(logprobs, np.array([0, 1, 1])) == {"accuracy": pytest.approx(2 / 3)}
    with pytest.raises(PeftJaxError, match="NaN"):
        class_metrics(np.array([[np.nan, 0.0]]), np.array([0]))
