"""Meshes of 8 virtual devices: the losses and weights of one, and the collectives that each mesh should have."""

import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from peft_jax import PeftJaxError, bind, chain, full, houlsby, lora, prefix, quant, quantize
from peft_jax.core import tree
from peft_jax.models.llama import CausalLM, LlamaConfig
from peft_jax.parallel import partitioning
from peft_jax.parallel.mesh import feed, make_mesh
from peft_jax.planner.collectives import collectives
from peft_jax.train.step import init_state, make_step, state_shardings

# Every axis of every kernel divides by 8, in whole blocks of 16.
MODEL = CausalLM(LlamaConfig(128, 128, 256, 2, 8, 8, 16, 1e-5, 1e4, 64, True))
METHODS = {
    "full": full(),
    "lora": lora(r=4, target_modules="all-linear"),
    "qlora": chain(quantize("nf4", block_size=16), lora(r=4, target_modules="all-linear")),
    "houlsby": houlsby(bottleneck_size=8),
    "prefix": prefix(num_virtual_tokens=4),
}
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "mixed": (2, 2, 2)}
# Where a method's leaves lie, and so what travels, is another matter on each mesh: each method on those where it
# differs from the others. Every method trains on a mesh of two axes in tests/methods/test_every_method.py.
PAIRS = {"full": ("data", "fsdp", "mixed"), "lora": ("data", "tensor"), "qlora": ("fsdp", "tensor"),
         "houlsby": ("tensor", "mixed"), "prefix": ("data", "tensor")}
FAST = {("qlora", "fsdp")}
LEARNING_RATE, STEPS, ROWS, LENGTH = 1e-3, 3, 8, 16


@pytest.fixture(scope="module")
def base():
    return MODEL.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="module")
def alone(base):
    """``alone(method's name)``: (losses, weights) of one device."""
    return cache(lambda name: trained(METHODS[name], base, make_mesh(1, 1, 1))[:2])


def batch_of(step):
    ids = np.random.default_rng(step).integers(0, 128, (1, ROWS, LENGTH)).astype(np.int32)
    whole = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    return {"input_ids": ids, "segment_ids": np.ones_like(ids), "positions": whole, "loss_index": whole[..., :-1],
            "loss_target": ids[..., 1:], "loss_weight": np.ones((1, ROWS, LENGTH - 1), np.float32)}


def started(method, base, mesh):
    """(params on the mesh, step, state, frozen)."""
    base = partitioning.put(base, partitioning.by_rules(base, mesh, MODEL.sharding)) if mesh.size > 1 else base
    params = partitioning.init(method, jax.random.key(1), base, mesh, MODEL.sharding)
    tx = optax.adam(LEARNING_RATE)
    trainable, frozen = tree.partition(params, method.labels(params))
    where = state_shardings(trainable, tx, mesh) if mesh.size > 1 else None
    step = make_step(bind(method, MODEL, mesh), tx, 50, mesh=mesh, where=where)
    return params, step, init_state(trainable, tx, jax.random.key(2), where), frozen


def trained(method, base, mesh):
    """(losses, trained weights, the compiled step's text, per-device bytes of all parameters)."""
    params, step, state, frozen = started(method, base, mesh)
    compiled = step.lower(state, frozen, feed(mesh, batch_of(0), axis=1)).compile()
    losses = []
    for number in range(STEPS):
        state, metrics = compiled(state, frozen, feed(mesh, batch_of(number), axis=1))
        losses.append(float(metrics["loss"]))
    device = mesh.devices.flat[0]
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
               if shard.device == device)
    return losses, jax.tree.map(np.asarray, state.trainable), compiled.as_text(), held


@pytest.mark.parametrize(("name", "shape"), [
    pytest.param(name, shape, marks=() if (name, shape) in FAST else pytest.mark.slow)
    for name, shapes in PAIRS.items() for shape in shapes])
def test_a_mesh_trains_what_one_device_trains(name, shape, base, alone):
    method, mesh = METHODS[name], make_mesh(*MESHES[shape])
    losses, weights, text, held = trained(method, base, mesh)
    losses_alone, weights_alone = alone(name)
    np.testing.assert_allclose(losses, losses_alone, rtol=2e-5)
    for path, leaf in tree.flatten(weights_alone).items():
        # Adam divides by the gradient's size: rounding in one near zero moves a weight by a share of the rate.
        np.testing.assert_allclose(tree.flatten(weights)[path], leaf, atol=0.3 * LEARNING_RATE, err_msg=path)
        moved = np.abs(tree.flatten(weights)[path] - leaf) > 0.02 * LEARNING_RATE
        assert moved.mean() < 0.02, path
    check_collectives(name, shape, text)
    check_bytes(name, mesh, base, held)


def check_collectives(name, shape, text):
    """What travels is what that mesh is for; no whole frozen stack of layers ever does."""
    found = [(one.kind, one.dtype, one.size) for one in collectives(text)]
    kinds = Counter(kind for kind, _, _ in found)
    kernel = 128 * 128  # of q_proj, one layer
    largest = max(size for _, _, size in found)
    assert largest <= 128 * 256, "more than one layer's largest kernel travels at once"
    gathers = [one for one in found if one[0] == "all-gather" and one[2] >= kernel // 2]
    if shape == "data":  # gradients alone
        assert not gathers and kinds["all-reduce"]
        if name != "full":
            assert largest < kernel
    if shape == "fsdp":  # every kernel of a layer, forward and backward
        packed = [size for _, kind, size in gathers if kind == "u8"]
        plain = [size for _, kind, size in gathers if kind == "f32" and size in (kernel, 2 * kernel)]
        if name == "qlora":  # half a byte each; plain only the embedding, which is not quantised
            assert len(packed) == 14 and set(packed) == {kernel // 2, kernel}
            assert len(plain) <= 3
        else:
            assert not packed and len(plain) >= 14
    if shape == "tensor":  # activations are summed after o_proj and down_proj, forward, and before q, k, v, gate, up
        tokens = ROWS * LENGTH * 128
        assert sum(kind == "all-reduce" and size == tokens for kind, _, size in found) >= 4
        assert not [one for one in gathers if one[2] in (kernel // 2, kernel, 2 * kernel) and one[2] != tokens]


def check_bytes(name, mesh, base, held):
    """Kernels and embedding are cut over fsdp and tensor; norms, scalings and prefixes are whole."""
    method = METHODS[name]
    flat = tree.flatten(jax.eval_shape(method.init, jax.random.key(1), base))
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    cut = sum(tree.nbytes(leaf) for path, leaf in flat.items() if path in tree.flatten(base) and leaf.ndim > 1 and
              not path.endswith("scale"))
    whole = tree.nbytes(flat) - cut
    assert cut / parts <= held <= cut / parts + whole


def test_every_large_leaf_is_covered(base):
    mesh = make_mesh(1, 8, 1)
    with pytest.raises(PeftJaxError, match=r"no rule says how 'embed_tokens/embedding' .*\(\"fsdp\", None\)"):
        partitioning.by_rules(base, mesh, MODEL.sharding[:1], large=1 << 12)
    lies = tree.flatten(partitioning.by_rules(base, mesh, MODEL.sharding, large=0))
    assert lies["layers/mlp/down_proj/kernel"].spec == P(None, ("tensor",), ("fsdp",))


def test_what_does_not_divide_moves_or_is_said(base):
    leaf = {"x": {"kernel": jax.ShapeDtypeStruct((2, 9, 64), jnp.float32)}}
    rules = (("x/kernel", ("fsdp", "tensor")),)
    lies = partitioning.by_rules(leaf, make_mesh(1, 4, 2), rules)["x"]["kernel"]
    assert lies.spec == P(None, (), ("tensor", "fsdp"))
    odd = {"x": {"kernel": jax.ShapeDtypeStruct((2, 9, 63), jnp.float32)}}
    assert partitioning.by_rules(odd, make_mesh(1, 4, 2), rules)["x"]["kernel"].spec == P(None, (), ())  # small
    with pytest.raises(PeftJaxError, match=r"'x/kernel' cannot be split over fsdp=4.*9 and 63.*--config.mesh.fsdp"):
        partitioning.by_rules(odd, make_mesh(1, 4, 2), rules, large=0)


def test_quantised_leaves_are_cut_between_blocks(base):
    params = jax.eval_shape(quantize("nf4", block_size=64, double_quant=True).init, jax.random.key(0), base)
    lies = tree.flatten(partitioning.by_rules(params, make_mesh(1, 4, 2), MODEL.sharding, large=0))
    one = lies["layers/mlp/up_proj/kernel"]  # 128 inputs are two blocks: four parts would cut them, so outputs are
    assert one.codes.spec == one.scales.spec == P(None, ("tensor", "fsdp"), ())
    assert one.gathered.spec == P(("tensor",), ()) and one.nested.spec == P()
    two = lies["layers/mlp/down_proj/kernel"]  # 256 inputs over tensor=2, outputs over fsdp
    assert two.codes.spec == P(None, ("fsdp",), ("tensor",))


def test_leaves_beside_a_kernel_lie_as_it_does(base):
    method = lora(r=4, target_modules="all-linear")
    params = jax.eval_shape(method.init, jax.random.key(0), base)
    lies = tree.flatten(partitioning.by_rules(params, make_mesh(1, 4, 2), MODEL.sharding, method))
    assert lies["layers/mlp/up_proj/lora_a"].spec == P(None, ("fsdp",), ())
    assert lies["layers/mlp/up_proj/lora_b"].spec == P(None, (), ("tensor",))
    assert lies["layers/mlp/down_proj/lora_a"].spec == P(None, ("tensor",), ())
    assert lies["layers/mlp/down_proj/lora_b"].spec == P(None, (), ("fsdp",))
    large = tree.flatten(partitioning.by_rules(params, make_mesh(1, 4, 2), MODEL.sharding, method, large=1 << 10))
    assert large["layers/mlp/up_proj/lora_b"].spec == P(None, (), ("tensor", "fsdp"))


@pytest.mark.parametrize("sizes, words", [
    ((3, 1, 1), ""), ((-1, -1, 1), "both -1"), ((-1, 3, 1), "does not fit 8 devices"), ((0, 1, 1), "mesh.data=0"),
    ((16, 1, 1), "does not fit"), ((2.0, 1, 1), "mesh.data=2.0"), ((True, 1, 1), "mesh.data=True"),
])
def test_a_mesh_that_does_not_fit_is_an_error(sizes, words):
    if not words:  # fewer than there are: the first ones
        assert make_mesh(*sizes).size == 3
        return
    with pytest.raises(PeftJaxError, match=re.escape(words)):
        make_mesh(*sizes)


@pytest.mark.slow
def test_fused_products_know_one_device(base):
    params = jax.eval_shape(quantize("nf4", product="fused").init, jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="fused kernel"):
        partitioning.by_rules(params, make_mesh(), MODEL.sharding)
    assert quant.is_leaf(partitioning.by_rules(params, make_mesh(1, 1, 1), MODEL.sharding)["layers"]["mlp"]["up_proj"]
                         ["kernel"])
