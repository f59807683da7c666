"""LoHa and LoKr: their options and equations, their exchange with real peft."""

import jax
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, bind, flatten, loha, lokr
from peft_jax.methods.lycoris.lokr import divided
from tests import peer, properties

peft = pytest.importorskip("peft")

MAKE = {"loha": loha, "lokr": lokr}
MIXED = {"target_modules": "all-linear", "rank_pattern": {r"layers.1.self_attn.(q|k)_proj": 1, "up_proj": 3},
         "alpha_pattern": {"layers.2.self_attn.q_proj": 5}, "modules_to_save": ["model.norm"]}
# name: (method, base, the config's arguments). The same words make the adapter here and in peft.
CASES = {
    "loha mixed": ("loha", "qwen2", {"r": 2, **MIXED}),
    "loha layers": ("loha", "llama", {"r": 3, "target_modules": ["o_proj"], "layers_to_transform": [0, 2]}),
    "lokr mixed": ("lokr", "qwen2", {"r": 1, **MIXED, "rank_pattern": {"up_proj": 2}}),
    "lokr padded": ("lokr", "llama", {"r": 1, "target_modules": ["up_proj", "down_proj"], "decompose_factor": 2,
                                      "rank_pattern": {r"layers.1.mlp.up_proj": 3}}),
    "lokr both": ("lokr", "llama", {"r": 1, "target_modules": ["up_proj", "down_proj"], "decompose_both": True,
                                    "init_weights": "lycoris", "layers_to_transform": [1]}),
    "lokr whole": ("lokr", "tied", {"r": 8, "target_modules": r".*\.layers\.[02]\..*(q|down)_proj"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    kind, name, options = CASES[case]
    padded = "rank_pattern" in options
    method = MAKE[kind](**options | ({"init_weights": False} if padded else {}))
    peer.check_opens_in_peft(peer_bases[name], method, tmp_path / "adapter",
                             change=peer.as_made if padded else properties.moved)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    kind, name, options = CASES[case]
    config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind](task_type="CAUSAL_LM", **options)
    peer.check_loads_from_peft(peer_bases[name], config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", [loha(r=2, **MIXED), lokr(r=1, init_weights="lycoris", layers_to_transform=1)],
                         ids=["loha", "lokr"])
def test_padding_stays_zero_in_training(peer_bases, method):
    _, model, base = peer_bases["llama"]
    before = method.init(jax.random.key(0), base)
    after = properties.trained(method, model, before, peer.IDS)
    trainable = flatten(peft_jax.partition(after, method.labels(after))[0])
    zeros = sum(int((leaf == 0).sum()) for path, leaf in trainable.items() if "norm" not in path)
    assert zeros == method.padding(before) > 0


def test_counts_are_the_closed_form():
    """On one (3072, 8192): LoHa 2 r (in + out); LoKr 48 * 64 for W1 and r (64 + 128) for W2."""
    base = {"up_proj": {"kernel": jax.ShapeDtypeStruct((3072, 8192), np.float32)}}
    for make, expected in ((loha, 2 * 8 * (3072 + 8192)), (lokr, 48 * 64 + 8 * (64 + 128))):
        method = make(target_modules=("up_proj",))
        params = jax.eval_shape(lambda p, m=method: m.init(jax.random.key(0), p), base)
        assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) == expected


def test_sides_divide_as_in_peft():
    from peft.tuners.lokr.layer import factorization

    for width in (1, 6, 12, 16, 127, 128, 576, 1536, 3072):
        for most in (-1, 1, 2, 4, 5, 7, 8, 16, 4000):
            assert divided(width, most) == factorization(width, most), (width, most)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_input_and_output_axes_of_dense_general(kind):
    """Written out in numpy on kernels of several input and output axes: flattened, then the equation."""
    model, x, base, axes = properties.generals(6)
    method = MAKE[kind](r=1, alpha=3, target_modules=("split", "out"))
    params = properties.moved(method, method.init(jax.random.key(0), base, axes))

    def kernel(leaves, inputs, outputs):
        flat = {name: np.asarray(leaf) for name, leaf in leaves.items()}
        if kind == "loha":
            one, two = (flat[f"hada_w{i}_b"].reshape(inputs, 1) @ flat[f"hada_w{i}_a"].reshape(1, outputs)
                        for i in (1, 2))
            change = one * two
        else:
            second = flat["lokr_w2"] if "lokr_w2" in flat else flat["lokr_w2_b"] @ flat["lokr_w2_a"]
            change = np.kron(flat["lokr_w1"], second)
        return flat["kernel"] + 3 * change.reshape(flat["kernel"].shape)

    split, out = params["split"], params["out"]
    mixed = np.einsum("bit,iac->btac", x, kernel(split, 6, 20)) + split["bias"]
    expected = np.einsum("btac,aco->bto", mixed, kernel(out, 20, 6)) + out["bias"]
    np.testing.assert_allclose(bind(method, model)({"params": params}, x), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_dropouts_switch_outputs_and_modules_off(kind):
    model, x = nn.Dense(400, use_bias=False), np.ones((3, 4), np.float32)
    base = model.init(jax.random.key(0), x)["params"]

    def change(rngs=None, **options):
        method = MAKE[kind](target_modules=".*", r=1, init_weights=False, **options)
        params = method.init(jax.random.key(0), base)
        tuned = bind(method, model)({"params": params}, x, **({"rngs": rngs} if rngs else {}))
        return np.asarray(tuned - model.apply({"params": base}, x))

    key = {"dropout": jax.random.key(3)}
    whole = change()
    np.testing.assert_array_equal(change(rank_dropout=0.5, module_dropout=0.5), whole)
    scaled = {} if kind == "loha" else {"rank_dropout_scale": True}
    thin = change(key, rank_dropout=0.25, **scaled)
    on = thin[0] != 0
    assert 0.65 < on.mean() < 0.85 and not thin[:, ~on].any()
    np.testing.assert_allclose(thin[:, on], whole[:, on] / on.mean(), rtol=1e-3, atol=1e-5)
    off = [not change({"dropout": jax.random.key(i)}, module_dropout=0.5).any() for i in range(12)]
    assert 1 < sum(off) < 11


def test_the_update_is_not_kept_for_the_backward_pass():
    """LoHa's is as large as the kernel: the forward pass leaves nothing of that size behind."""
    model, x = nn.Dense(96, use_bias=False), np.ones((3, 64), np.float32)
    base = model.init(jax.random.key(0), x)["params"]
    method = loha(target_modules=".*", init_weights=False)
    params = method.init(jax.random.key(0), base)
    _, pull = jax.vjp(lambda p: bind(method, model)({"params": p}, x).sum(), params)
    assert [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.size >= 64 * 96] == []


@pytest.mark.slow
def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    for make in MAKE.values():
        with pytest.raises(PeftJaxError, match="r=0: a rank is"):
            make(r=0)
        with pytest.raises(PeftJaxError, match="rank_dropout=1"):
            make(rank_dropout=1)
        with pytest.raises(PeftJaxError, match=r"did you mean down_proj\?"):
            make(target_modules=("down_porj",)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="decompose_factor=0"):
        lokr(decompose_factor=0)
    with pytest.raises(PeftJaxError, match="gives some layers of the stack 'layers/self_attn/q_proj' factors"):
        lokr(r=1, rank_pattern={"layers.0.self_attn.q_proj": 8}).init(jax.random.key(0), base)
