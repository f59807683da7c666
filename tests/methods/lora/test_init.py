"""PiSSA, OLoRA, orthogonal: the start is the base model and what peft starts from; the file fits the base as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import PeftJaxError, dora, flatten, load_adapter, lora, save_adapter
from tests import peer, properties

peft = pytest.importorskip("peft")

STARTS = ("pissa", "pissa_niter_4", "olora", "orthogonal")
OPTIONS = {"r": 4, "lora_alpha": 6, "target_modules": ("q_proj", "down_proj")}


@pytest.mark.parametrize("how", STARTS)
def test_the_start_is_the_base_model_to_rounding(peer_bases, how):
    base = peer_bases["qwen2"][2]
    method = lora(init_lora_weights=how, layers_to_transform=(0, 2), **OPTIONS)
    params = method.init(jax.random.key(0), base)
    merged = flatten(method.merge(params))
    for path, leaf in flatten(base).items():
        np.testing.assert_allclose(merged[path], leaf, atol=2e-6, err_msg=path)
    assert merged.keys() == flatten(base).keys()
    moved = np.abs(flatten(params)["layers/mlp/down_proj/kernel"] - flatten(base)["layers/mlp/down_proj/kernel"])
    assert (moved.max((1, 2)) > 0.1).tolist() == [how != "orthogonal", False, how != "orthogonal"]
    assert moved[1].max() == 0


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_b_and_what_stays_of_the_kernel_are_peft_s(peer_bases, how):
    fresh, _, base = peer_bases["llama"]
    options = {**OPTIONS, "rank_pattern": {"layers.1.self_attn.q_proj": 2}}
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=how, **options))
    params = flatten(lora(init_lora_weights=how, **options).init(jax.random.key(0), base))
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        for layer in range(3):
            layers = theirs.base_model.model.model.layers
            held = layers[layer].get_submodule(module)
            ours = {leaf: np.asarray(params[f"layers/{module.replace('.', '/')}/{leaf}"][layer])
                    for leaf in ("kernel", "lora_a", "lora_b", "lora_scaling")}
            a, b = (getattr(held, name)["default"].weight.detach().numpy().T for name in ("lora_A", "lora_B"))
            np.testing.assert_allclose(ours["kernel"], held.base_layer.weight.detach().numpy().T, atol=1e-5)
            np.testing.assert_allclose(ours["lora_a"] @ ours["lora_b"], a @ b, atol=1e-5)
            assert ours["lora_scaling"] == pytest.approx(held.scaling["default"])
            if how == "olora":  # QR has one answer where LAPACK makes it; singular vectors have either sign
                np.testing.assert_allclose(ours["lora_a"][:, :a.shape[1]], a, atol=1e-5)


def test_pissa_is_the_largest_singular_values_and_iterations_come_near_them():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(20, 20)))[0] for _ in range(2))
    kernel = (u * 0.5 ** np.arange(20)) @ v  # each value half the one before, so that iterations converge
    for how, error in (("pissa", 1e-6), ("pissa_niter_8", 1e-5)):
        method = lora(r=3, lora_alpha=6, target_modules=("q",), init_lora_weights=how)
        leaves = method.init(jax.random.key(0), {"q": {"kernel": jnp.asarray(kernel, jnp.float32)}})["q"]
        np.testing.assert_allclose(2 * leaves["lora_a"] @ leaves["lora_b"], (u[:, :3] * [1, 0.5, 0.25]) @ v[:3],
                                   atol=error)
        root = [1, 0.5**0.5, 0.5]  # A and B share the singular values, less the scale of 2
        np.testing.assert_allclose(np.linalg.norm(leaves["lora_a"], axis=0), np.array(root) / 2**0.5, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(leaves["lora_b"], axis=1), np.array(root) / 2**0.5, rtol=1e-4)


CONVERTED = {
    "pissa": (lora, {}),
    "olora": (lora, {"use_rslora": True, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "lora_alpha": 3,
                     "alpha_pattern": {"down_proj": 2}}),
    "pissa_niter_4": (dora, {"layers_to_transform": (0, 2)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CONVERTED)
def test_the_file_fits_the_base_as_it_was(peer_bases, how, tmp_path):
    """Trained here, saved, opened by peft and here on the unchanged base: the same logits."""
    fresh, model, base = peer_bases["qwen2"]
    make, options = CONVERTED[how]
    method = make(init_lora_weights=how, **OPTIONS | options)
    params = peer.trained_here((fresh, model, base))(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    ours = peer.bound_logits(method, model, params)
    assert np.abs(ours - peer.forward(model, base)).max() > 1e-2 * np.abs(ours).max()
    peer.assert_close(ours, peer.torch_logits(peft.PeftModel.from_pretrained(fresh(), tmp_path)))
    peer.assert_close(peer.forward(model, method.merge(params)), ours)
    again, loaded = load_adapter(tmp_path, base)
    peer.assert_close(peer.bound_logits(again, model, loaded), ours)
    assert again.config["r"] == 8 and again.config["init_lora_weights"] is True


def test_what_peft_converted_loads_here(peer_bases, tmp_path):
    fresh, model, base = peer_bases["llama"]
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights="pissa", **OPTIONS))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    peer.train_there(theirs)
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    method, params = load_adapter(tmp_path / "end", base)
    peer.assert_close(peer.bound_logits(method, model, params), peer.torch_logits(theirs))


@pytest.mark.slow
def test_the_promises_of_a_method(peer_bases):
    _, model, base = peer_bases["qwen2"]
    method = lora(init_lora_weights="pissa", **OPTIONS)
    properties.check_merge(method, model, base, peer.IDS)
    trainable, _ = peft_jax.partition(*(f(base) for f in (lambda b: method.init(jax.random.key(0), b), lambda b:
                                                          method.labels(method.init(jax.random.key(0), b)))))
    assert peft_jax.count(trainable) == 3 * 4 * (16 + 16 + 24 + 16)


def test_orthogonal_halves_of_the_rank():
    base = {"layers": {"q": {"kernel": jnp.zeros((3, 400, 300))}}}
    method = lora(r=6, target_modules=("q",), init_lora_weights="orthogonal", rank_pattern={"1.q": 4})
    leaves = method.init(jax.random.key(0), base)["layers"]["q"]
    for layer, rank in enumerate((6, 4, 6)):
        a, b = np.asarray(leaves["lora_a"][layer]), np.asarray(leaves["lora_b"][layer])
        assert np.abs(a @ b).max() < 1e-6 and not a[:, rank:].any() and not b[rank:].any()
        assert np.linalg.matrix_rank(a, tol=1e-3) == np.linalg.matrix_rank(b, tol=1e-3) == rank // 2
        np.testing.assert_allclose((a**2).sum() / (400 * rank / 2), 0.01, rtol=0.15)  # normal / 10, as peft


@pytest.mark.slow
def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    for options, message in (
        ({"init_lora_weights": "pisa"}, "did you mean pissa"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "every rank must be even, one is 3"),
        ({"init_lora_weights": "pissa", "r": 17}, "has 16 singular values, so a rank of 17 is too high"),
        ({"init_lora_weights": "pissa", "lora_alpha": -1}, "lora_alpha must be above 0"),
        ({"init_lora_weights": "eva"}, "needs to see data first"),
        ({"eva_config": {"roh": 1}}, "choose one of: adjust_scaling_factors, rho"),
    ):
        with pytest.raises(PeftJaxError, match=message):
            lora(**{"target_modules": ("q_proj",), **options}).init(jax.random.key(0), base)
