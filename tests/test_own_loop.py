"""A user's own loop, from public names alone: optax over the whole tree, and a step on a mesh of eight devices."""

from functools import partial

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax
from peft_jax.models import CausalLM, LlamaConfig

# Every axis of every kernel divides by 8, in whole blocks of 16.
MODEL = CausalLM(LlamaConfig(128, 128, 128, 1, 8, 8, 16, 1e-5, 1e4, 64, True))
TARGETS = ("q_proj", "down_proj")
QLORA = peft_jax.chain(peft_jax.quantize("nf4", block_size=16, double_quant=True),
                       peft_jax.lora(r=4, target_modules=TARGETS, init_lora_weights=False))
METHODS = {
    "lora": peft_jax.lora(r=4, target_modules=TARGETS, init_lora_weights=False),
    "qlora": QLORA,
    "loraplus": peft_jax.loraplus(r=4, target_modules=TARGETS, init_lora_weights=False),
}
STEPS, ROWS, LENGTH = 3, 8, 16
IDS = np.random.default_rng(0).integers(0, 128, (STEPS, ROWS, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def base():
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def groups_of(method, rest):
    """An optimiser for each group of leaves: LoRA+'s B learns faster."""
    rates = {"trainable": optax.adam(1e-3), "lora_b": optax.adam(4e-3)}
    return {**(rates if method is METHODS["loraplus"] else {"trainable": rates["trainable"]}), **rest}


def loss_of(apply, params, ids):
    logits = apply({"params": params}, ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def whole_tree(method, params):
    """(losses, params) of optax's way: one transformation over the whole tree, which freezes by label."""
    chex.clear_trace_counter()
    apply = peft_jax.bind(method, MODEL)
    tx = optax.multi_transform(groups_of(method, {"frozen": optax.set_to_zero()}), method.labels)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, ids):
        loss, gradient = peft_jax.value_and_grad(partial(loss_of, apply))(params, ids)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for ids in IDS:
        params, state, loss = step(params, state, ids)
        losses.append(float(loss))
    return losses, params


def parts(method, params):
    """(losses, params) of the library's way: the trainable part alone is differentiated and optimised."""
    chex.clear_trace_counter()
    apply, labels = peft_jax.bind(method, MODEL), peft_jax.flatten(method.labels(params))
    trainable, frozen = peft_jax.partition(params, method)
    own = peft_jax.unflatten({path: labels[path] for path in peft_jax.flatten(trainable)})
    tx = optax.multi_transform(groups_of(method, {}), own)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(trainable, state, ids):
        loss, gradient = jax.value_and_grad(
            lambda leaves: loss_of(apply, peft_jax.combine(frozen, leaves), ids))(trainable)
        updates, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = tx.init(trainable), []
    for ids in IDS:
        trainable, state, loss = step(trainable, state, ids)
        losses.append(float(loss))
    return losses, peft_jax.combine(frozen, trainable)


@pytest.fixture(scope="module")
def both(base):
    """{method: (params at the start, what the library's way makes of them)}."""
    starts = {name: method.init(jax.random.key(1), base) for name, method in METHODS.items()}
    return {name: (params, parts(METHODS[name], params)) for name, params in starts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [dict, flax.core.freeze])
@pytest.mark.parametrize("name", METHODS)
def test_multi_transform_over_the_whole_tree_takes_the_steps_of_partition(name, kind, both):
    params, (losses, expected) = both[name]
    whole = kind(params)
    own_losses, tuned = whole_tree(METHODS[name], whole)
    np.testing.assert_allclose(own_losses, losses, rtol=1e-6)
    chex.assert_trees_all_equal_structs(tuned, whole)
    chex.assert_trees_all_equal_dtypes(tuned, whole)
    chex.assert_trees_all_close(dict(peft_jax.flatten(tuned)), peft_jax.flatten(expected), rtol=0, atol=1e-6)
    trainable, frozen = peft_jax.partition(tuned, METHODS[name])
    chex.assert_trees_all_equal(frozen, peft_jax.partition(params, METHODS[name])[1])  # codes and scales, bit for bit
    moved = [path for path, leaf in peft_jax.flatten(trainable).items()
             if not np.array_equal(leaf, peft_jax.flatten(params)[path])]
    assert len(moved) == 2 * len(TARGETS)


def test_the_optimiser_keeps_moments_of_the_trainable_part_alone(both):
    params = both["qlora"][0]
    tx = optax.multi_transform({"trainable": optax.adam(1e-3), "frozen": optax.set_to_zero()}, QLORA.labels)
    trainable, _ = peft_jax.partition(params, QLORA)
    sizes = [leaf.size for leaf in jax.tree.leaves(tx.init(params))]
    assert sum(sizes) == 2 * peft_jax.count(trainable) + 1


def test_labels_have_the_structure_of_the_tree(both):
    params = both["loraplus"][0]
    for tree in (params, flax.core.freeze(params)):
        chex.assert_trees_all_equal_structs(METHODS["loraplus"].labels(tree), tree)


def test_an_empty_module_has_its_place_in_the_labels():
    params = {"up_proj": {"kernel": jnp.ones((8, 8))}, "dropout": {}}
    method = peft_jax.ia3(target_modules=("up_proj",), feedforward_modules=())
    labels = method.labels(params | method.init(jax.random.key(0), params))
    assert labels["dropout"] == {} and set(labels["up_proj"].values()) == {"trainable", "frozen"}


def test_value_and_grad_is_that_of_jax_where_leaves_are_plain_and_gives_aux():
    params = {"a": jnp.array([1.0, 2.0]), "steps": jnp.int32(3)}

    def loss(params, factor):
        return factor * (params["a"] ** 2).sum(), params["steps"]

    (value, steps), gradient = peft_jax.value_and_grad(loss, has_aux=True)(params, 2.0)
    chex.assert_trees_all_close(gradient["a"], jax.grad(lambda a: 2 * (a**2).sum())(params["a"]))
    assert (float(value), int(steps), int(gradient["steps"]), gradient["steps"].dtype) == (10, 3, 0, jnp.int32)


def batch_of(ids):
    """One micro-batch in which every token but the first is learnt."""
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)[None]
    return {"input_ids": ids[None], "segment_ids": np.ones_like(ids)[None], "positions": positions,
            "loss_index": positions[..., :-1], "loss_target": ids[None, :, 1:],
            "loss_weight": np.ones((1, ROWS, LENGTH - 1), np.float32)}


def on_mesh(params, mesh):
    """(losses, params) of a loop on a mesh."""
    tx = optax.adam(1e-3)
    params = peft_jax.place(QLORA, MODEL, params, mesh)
    trainable, frozen = peft_jax.partition(params, QLORA)
    where = peft_jax.state_shardings(trainable, tx, mesh)
    state = peft_jax.init_state(trainable, tx, jax.random.key(2), where)
    step = peft_jax.make_step(peft_jax.bind(QLORA, MODEL, mesh), tx, 50, mesh=mesh, where=where)
    losses = []
    for ids in IDS:
        state, metrics = step(state, frozen, batch_of(ids))
        losses.append(float(metrics["loss"]))
    assert isinstance(state, peft_jax.TrainState)
    return losses, peft_jax.combine(frozen, state.trainable)


@pytest.mark.slow
def test_qlora_on_a_mesh_equals_one_device_by_public_names_alone(both):
    losses, expected = on_mesh(both["qlora"][0], peft_jax.make_mesh(1, 1, 1))
    mesh = peft_jax.make_mesh(2, 2, 2)
    own_losses, tuned = on_mesh(both["qlora"][0], mesh)
    np.testing.assert_allclose(own_losses, losses, rtol=2e-5)
    for path, leaf in peft_jax.flatten(peft_jax.partition(expected, QLORA)[0]).items():
        np.testing.assert_allclose(peft_jax.flatten(tuned)[path], leaf, atol=3e-4, err_msg=path)
    codes = tuned["layers"]["self_attn"]["q_proj"]["kernel"].codes
    assert codes.sharding.mesh == mesh and codes.addressable_shards[0].data.size * 4 == codes.size


def test_place_puts_every_leaf_where_shardings_says(both):
    params, mesh = both["qlora"][0], peft_jax.make_mesh(1, 4, 2)
    placed = peft_jax.place(QLORA, MODEL, params, mesh)
    where = peft_jax.shardings(QLORA, MODEL, params, mesh)
    chex.assert_trees_all_equal_structs(placed, where)  # of a quantised leaf: where its codes come together, too
    jax.tree.map(lambda leaf, sharding: chex.assert_equal(leaf.sharding, sharding), placed, where)
    chex.assert_trees_all_equal(jax.tree.leaves(placed), jax.tree.leaves(params))
    again = peft_jax.place(QLORA, MODEL, placed, mesh)
    same = [new is old or new.unsafe_buffer_pointer() == old.unsafe_buffer_pointer()
            for new, old in zip(*(peft_jax.flatten(peft_jax.partition(tree, QLORA)[0]).values()
                                  for tree in (again, placed))) if new.sharding.is_fully_replicated]
    assert all(same)
