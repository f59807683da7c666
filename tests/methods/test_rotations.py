"""OFT and HRA, which turn a module's input: their options and equations, their exchange with real peft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, bind, flatten, hra, oft
from peft_jax.methods.hra import sides
from peft_jax.methods.oft import excess, nearest_divisor, skew
from tests import peer, properties

peft = pytest.importorskip("peft")

MAKE = {"oft": oft, "hra": hra}
EXACT = {"oft_block_size": 4, "use_cayley_neumann": False}
# name: (method, base, the config's arguments). The same words make the adapter here and in peft.
CASES = {
    "oft exact": ("oft", "qwen2", {**EXACT, "target_modules": "all-linear", "bias": "oft_only"}),
    "oft blocks": ("oft", "llama", {"r": 5, "oft_block_size": 0, "num_cayley_neumann_terms": 3,
                                    "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
    "oft shared": ("oft", "tied", {"oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 7,
                                   "target_modules": ["up_proj"], "modules_to_save": ["model.norm"]}),
    "oft two terms": ("oft", "llama", {"oft_block_size": 4, "num_cayley_neumann_terms": 2}),
    "coft": ("oft", "llama", {"oft_block_size": 4, "coft": True, "eps": 0.3, "target_modules": "all-linear"}),
    "hra odd": ("hra", "qwen2", {"r": 3, "target_modules": "all-linear", "bias": "all"}),
    "hra layers": ("hra", "tied", {"r": 2, "target_modules": ["down_proj"], "layers_to_transform": [1],
                                   "modules_to_save": ["model.norm"]}),
    "hra orthogonal": ("hra", "llama", {"r": 3, "apply_GS": True, "target_modules": ["q_proj", "up_proj"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    kind, name, options = CASES[case]
    peer.check_opens_in_peft(peer_bases[name], MAKE[kind](**options), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    kind, name, options = CASES[case]
    config = {"oft": peft.OFTConfig, "hra": peft.HRAConfig}[kind](task_type="CAUSAL_LM", **options)
    peer.check_loads_from_peft(peer_bases[name], config, tmp_path)


@pytest.mark.slow
def test_the_promises_of_an_exact_oft(peer_bases):
    """Those of the series are in test_every_method.py."""
    _, model, base = peer_bases["qwen2"]
    method = oft(target_modules=("q_proj", "down_proj"), **EXACT)
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_training(method, model, base, peer.IDS)
    properties.check_merge(method, model, base, peer.IDS)
    properties.check_remat(method, model, base, peer.IDS)


@pytest.mark.slow
def test_the_promises_of_an_orthogonal_hra(peer_bases):
    """Those of plain reflections, which start from the base, are in test_every_method.py."""
    _, model, base = peer_bases["qwen2"]
    method = hra(r=4, target_modules=("q_proj", "down_proj"), apply_GS=True)
    properties.check_training(method, model, base, peer.IDS)
    properties.check_merge(method, model, base, peer.IDS)
    properties.check_remat(method, model, base, peer.IDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_zeros_of_layers_that_are_not_adapted_divide_nothing(peer_bases, kind):
    _, model, base = peer_bases["qwen2"]
    method = MAKE[kind](target_modules=("q_proj",), layers_to_transform=1)
    assert method.padding(method.init(jax.random.key(0), base)) == 2 * {"oft": 16 * 15 // 2, "hra": 16 * 8}[kind]
    after = properties.trained(method, model, method.init(jax.random.key(0), base), peer.IDS)
    assert all(np.isfinite(leaf).all() for leaf in flatten(after).values())


def test_rotations_and_reflections_are_orthogonal():
    """R R' = I: of the exact Cayley transform and of reflections to rounding, of the series up to its last power."""
    rng = np.random.default_rng(0)
    upper, on = jnp.asarray(0.1 * rng.normal(size=(3, 6)), jnp.float32), jnp.float32(1)
    u = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)

    def error(part):
        whole = np.eye(part.shape[-1]) + np.asarray(part, np.float64)
        return np.abs(whole @ np.swapaxes(whole, -1, -2) - np.eye(part.shape[-1])).max()

    def turned(**options):
        return excess(oft(oft_block_size=4, **options).config, upper, on)

    assert error(turned(use_cayley_neumann=False)) < 1e-6
    longest = np.linalg.norm(skew(upper), axis=(1, 2)).max()
    assert error(turned(num_cayley_neumann_terms=9)) < error(turned()) < 2 * longest**4
    for orthogonal in (False, True):
        left, right = sides(u, on, orthogonal)
        assert error(-left @ right.T) < 1e-5


def test_constrained_rotations_stay_within_eps():
    upper = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
    config = oft(oft_block_size=4, coft=True, eps=1e-3, use_cayley_neumann=False).config
    turn = excess(config, upper, jnp.float32(1))  # R - I is -2 Q to first order
    np.testing.assert_allclose(np.linalg.norm(turn, axis=(1, 2)), 2e-3 / np.sqrt(3), rtol=1e-3)


def test_block_sizes_are_peft_s():
    from peft.tuners.oft.layer import OFTLayer

    adjust = OFTLayer.adjust_oft_parameters
    for width in (16, 24, 127, 576):
        for wanted in (1, 2, 5, 7, 30, 32, 100, 600):
            theirs = wanted if width % wanted == 0 else adjust(None, width, wanted)
            assert nearest_divisor(width, wanted) == theirs, (width, wanted)


def test_counts_are_the_closed_form():
    """Of 576 inputs: 18 blocks of 32 * 31 / 2, one of them where they share it; 576 * 8 for eight reflections."""
    base = {"up_proj": {"kernel": jax.ShapeDtypeStruct((576, 1536), jnp.bfloat16)}}
    for method, expected in ((oft(target_modules=".*"), 18 * 496), (oft(target_modules=".*", block_share=True), 496),
                             (hra(target_modules=".*"), 576 * 8)):
        params = jax.eval_shape(lambda p, m=method: m.init(jax.random.key(0), p), base)
        assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_input_and_output_axes_of_dense_general(kind):
    """Written out in numpy on kernels of several input and output axes: each reflection, each block by itself."""
    model, x, base, axes = properties.generals()
    options = {"oft": {"oft_block_size": 2, "use_cayley_neumann": False}, "hra": {"r": 3}}[kind]
    method = MAKE[kind](target_modules=("split", "out"), **options)
    params = properties.moved(method, method.init(jax.random.key(0), base, axes))

    def whole(leaves, width):
        turn = np.eye(width)
        if kind == "hra":
            for u in leaves["hra_u"].reshape(width, 3).T:
                turn = (np.eye(width) - 2 * np.outer(u, u) / (u @ u)) @ turn
            return turn
        for block, (angle,) in enumerate(leaves["oft_r"]):
            q = np.array([[0, angle], [-angle, 0]])
            at = slice(2 * block, 2 * block + 2)
            turn[at, at] = (np.eye(2) - q) @ np.linalg.inv(np.eye(2) + q)
        return turn

    split, out = params["split"], params["out"]
    mixed = np.einsum("bit,ij,jac->btac", x, whole(split, 6), split["kernel"]) + split["bias"]
    turned = (mixed.reshape(2, 7, 20) @ whole(out, 20)).reshape(mixed.shape)
    expected = np.einsum("btac,aco->bto", turned, out["kernel"]) + out["bias"]
    np.testing.assert_allclose(bind(method, model)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_leaves_blocks_unrotated():
    model, x = nn.Dense(8, use_bias=False), np.ones((1, 8), np.float32)
    base = {"kernel": jnp.eye(8)}
    method = oft(target_modules=".*", oft_block_size=2, module_dropout=0.5, init_weights=False)
    params = method.init(jax.random.key(0), base)
    apply = bind(method, model)
    np.testing.assert_array_equal((np.asarray(apply({"params": params}, x)) != 1).sum(), 8)
    seen = set()
    for seed in range(4):
        y = np.asarray(apply({"params": params}, x, rngs={"dropout": jax.random.key(seed)}))[0] != 1
        assert y.sum() == 4
        seen.add(tuple(y))
    assert len(seen) > 1


def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    for make in MAKE.values():
        with pytest.raises(PeftJaxError, match=r"did you mean down_proj\?"):
            make(target_modules=("down_porj",)).init(jax.random.key(0), base)
        with pytest.raises(PeftJaxError, match="bias='lora_only'"):
            make(bias="lora_only")
    for r, size in ((0, 0), (4, 4), (-1, 0), (0, 2.5)):
        with pytest.raises(PeftJaxError, match="give one of them"):
            oft(r=r, oft_block_size=size)
    with pytest.raises(PeftJaxError, match="in blocks of one"):
        oft(oft_block_size=1).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="block_share=True needs"):
        _, _, foreign, axes = properties.generals()
        oft(target_modules=("split",), block_share=True).init(jax.random.key(0), foreign, axes)
