import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from peft_jax import bind, combine, flatten, lora, partition, untie
from peft_jax.models import CausalLM, LlamaConfig
from peft_jax.train.optimizer import make_optimizer
from peft_jax.train.step import init_state, make_step

CONFIG = LlamaConfig(
    vocab_size=29, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=32,
    tie_word_embeddings=True, qkv_bias=True,
)  # fmt: skip
MODEL = CausalLM(CONFIG)
ROWS, LENGTH, ANSWERS = 4, 7, 3


@pytest.fixture(scope="module")
def base():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    shapes.pop("lm_head", None)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def batch(micro):
    """Four rows as ``micro`` micro-batches; how many answer tokens weigh differs from row to row."""
    rng = np.random.default_rng(1)
    flat = {
        "input_ids": rng.integers(0, 29, (ROWS, LENGTH)), "segment_ids": np.ones((ROWS, LENGTH), np.int32),
        "positions": np.tile(np.arange(LENGTH), (ROWS, 1)), "loss_index": rng.integers(0, LENGTH, (ROWS, ANSWERS)),
        "loss_target": rng.integers(0, 29, (ROWS, ANSWERS)),
        "loss_weight": np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], np.float32),
    }  # fmt: skip
    return {name: leaf.reshape(micro, ROWS // micro, *leaf.shape[1:]) for name, leaf in flat.items()}


def setting(params, tx=None, **options):
    """(method, trainable, frozen, tx) of a LoRA that is not the identity."""
    method = lora(**{"r": 2, "init_lora_weights": False, **options})
    tuned = method.init(jax.random.key(0), params)
    return method, *partition(tuned, method.labels(tuned)), tx or optax.sgd(1.0)


def after(params, micro=1, chunk=64, penalty=None, weight=1, **options):
    """(trainable leaves, metrics) after one step; every answer's weight times ``weight``."""
    method, trainable, frozen, tx = setting(params, **options)
    rows = batch(micro) | {"loss_weight": weight * batch(micro)["loss_weight"]}
    step = make_step(bind(method, MODEL), tx, chunk, penalty=penalty)
    state, metrics = step(init_state(trainable, tx, jax.random.key(1)), frozen, rows)
    return flatten(state.trainable), metrics


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def plain(base):
    return after(base)


def whole_loss(method, tree_):
    """The mean loss over answer tokens from all logits at once, and its gradient."""
    flat = jax.tree.map(lambda leaf: leaf[0], batch(1))

    def loss(leaves, frozen):
        logits = bind(method, MODEL)({"params": combine(frozen, leaves)}, flat["input_ids"])
        picked = jnp.take_along_axis(logits, flat["loss_index"][..., None], axis=1)
        losses = optax.softmax_cross_entropy_with_integer_labels(picked, flat["loss_target"])
        return (losses * flat["loss_weight"]).sum() / flat["loss_weight"].sum()

    return jax.jit(jax.value_and_grad(loss))(*tree_)


@pytest.mark.slow
def test_loss_norm_and_update_are_those_of_whole_logits(base, plain):
    method, trainable, frozen, _ = setting(base)
    loss, gradient = whole_loss(method, (trainable, frozen))
    moved, metrics = plain
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    assert_close(moved, flatten(jax.tree.map(lambda leaf, g: leaf - g, trainable, gradient)))


@pytest.mark.slow
def test_accumulated_batches_equal_one_big_batch(base, plain):
    moved, metrics = after(base, micro=4)
    assert_close(moved, plain[0])
    assert_close(metrics, plain[1])


@pytest.mark.slow
def test_chunked_loss_equals_the_whole(base, plain):
    moved, metrics = after(base, chunk=5)
    assert_close(moved, plain[0])
    assert_close(metrics, plain[1])


@pytest.mark.slow
def test_a_batch_without_answers_changes_nothing(base):
    moved, metrics = after(base, weight=0)
    assert {name: float(value) for name, value in metrics.items()} == dict.fromkeys(metrics, 0.0)
    assert_close(moved, flatten(setting(base)[1]))


@pytest.mark.slow
def test_a_penalty_moves_the_leaves_once_and_is_not_in_the_loss(base, plain):
    """Half the squares of the trained leaves: its gradient is the leaves themselves, however the batch is split."""
    trainable = flatten(setting(base)[1])

    def penalty(params):
        return sum(0.5 * jnp.sum(flatten(params)[path] ** 2) for path in trainable)

    moved, metrics = after(base, micro=4, penalty=penalty)
    np.testing.assert_allclose(metrics["loss"], plain[1]["loss"], rtol=1e-5)
    assert_close(moved, {path: plain[0][path] - leaf for path, leaf in trainable.items()})


@pytest.mark.slow
def test_a_trained_head_gets_the_same_gradient_in_chunks(base):
    options = {"modules_to_save": ("lm_head",)}
    assert_close(after(untie(base), chunk=5, micro=2, **options)[0], after(untie(base), **options)[0])


@pytest.mark.slow
def test_a_tied_embedding_gets_its_gradient_as_head_too(base):
    options = {"modules_to_save": ("embed_tokens",)}
    method, trainable, frozen, _ = setting(base, **options)
    _, gradient = whole_loss(method, (trainable, frozen))
    assert_close(after(base, chunk=5, **options)[0],
                 flatten(jax.tree.map(lambda leaf, g: leaf - g, trainable, gradient)))


@pytest.mark.slow
def test_dropout_in_layers_and_head_is_drawn_anew_each_step(base):
    method, trainable, frozen, tx = setting(untie(base), optax.sgd(0.0), target_modules=("q_proj", "lm_head"),
                                            lora_dropout=0.5)  # fmt: skip
    step, losses = make_step(bind(method, MODEL), tx, 64), []
    same = jax.tree.map(lambda x: np.concatenate([x[:1], x[:1]]), batch(2))
    for _ in range(2):
        state = init_state(trainable, tx, jax.random.key(1))
        for _ in range(2):
            state, metrics = step(state, frozen, same)
            losses.append(float(metrics["loss"]))
    assert losses[:2] == losses[2:] and np.isfinite(losses).all() and abs(losses[0] - losses[1]) > 1e-4
    # And in each micro-batch: did both draw the same, the second one, which is the first again, would change no mean.
    only_first = same | {"loss_weight": same["loss_weight"] * np.array([1, 0], np.float32)[:, None, None]}
    _, metrics = step(init_state(trainable, tx, jax.random.key(1)), frozen, only_first)
    assert abs(losses[0] - float(metrics["loss"])) > 1e-4


def test_the_state_is_donated_and_the_base_is_not(base):
    """Biases train here as they are: the state must not donate the base's own buffers."""
    method, trainable, frozen, tx = setting(base, bias="all")
    state = init_state(trainable, tx, jax.random.key(1))
    old = jax.tree.leaves(state.trainable)
    new, _ = make_step(bind(method, MODEL), tx, 64)(state, frozen, batch(1))
    assert int(new.step) == 1
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((base, trainable, frozen)))


@pytest.mark.slow
def test_clipping_sees_the_trainable_part_alone(base, plain):
    method, trainable, frozen, _ = setting(base)
    tx = make_optimizer(10, learning_rate=0.1, schedule="constant", warmup_ratio=0.0, clip_norm=0.01)
    state = init_state(trainable, tx, jax.random.key(1))
    state, metrics = make_step(bind(method, MODEL), tx, 64)(state, frozen, batch(1))
    np.testing.assert_allclose(metrics["grad_norm"], plain[1]["grad_norm"], rtol=1e-5)  # before clipping
    moments = next(part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
                   if hasattr(part, "mu"))
    assert flatten(moments).keys() == flatten(trainable).keys()
    np.testing.assert_allclose(optax.tree.norm(moments), 0.1 * 0.01, rtol=1e-4)  # (1 - b1) of the clipped gradient
    by = jax.tree.map(jnp.subtract, state.trainable, trainable)
    np.testing.assert_allclose(metrics["update_norm"], optax.tree.norm(by), rtol=1e-4)
