"""Bottleneck adapters: their equations, their places, their files; their values are in test_adapterhub.py."""

import inspect
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from configs.methods import method_config
from peft_jax import (
    METHODS,
    PeftJaxError,
    bind,
    bottleneck,
    chain,
    combine,
    compacter,
    flatten,
    houlsby,
    ia3,
    kernel_axes,
    load_adapter,
    lora,
    parallel_adapter,
    partition,
    pfeiffer,
    save_adapter,
    unflatten,
)
from tests import peer, properties

PLAIN = {"houlsby": houlsby(4), "pfeiffer": pfeiffer(4), "parallel": parallel_adapter()}
EVERY = {**PLAIN, "compacter": compacter(2)}


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


class Sublayers(nn.Module):
    """Two pre-norm sublayers, written by nobody here: the second returns a tuple."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.Dense(6, name="mix")(nn.LayerNorm(name="first")(x))
        y, _ = Pair(name="ffn")(nn.LayerNorm(name="second")(x))
        return x + y


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="two")(nn.tanh(nn.Dense(9, name="one")(x))), None


FOREIGN = {"attention_modules": ("mix",), "output_modules": ("ffn",), "norm_modules": ("first", "second"),
           "hidden_size": 6, "bottleneck_size": 2}
X = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def branch(p, act, u):
    return act(u @ p["adapter_down"] + p["adapter_down_bias"]) @ p["adapter_up"] + p["adapter_up_bias"]


def written_out(p, kind):
    """The foreign model with adapters, in numpy."""
    f, x = branch, X
    h = dense(p["mix"], norm(p["first"], x))
    x = x + h + (f(p["mix"], gelu, h) if kind == "houlsby" else 0)
    y = dense(p["ffn"]["two"], np.tanh(dense(p["ffn"]["one"], norm(p["second"], x))))
    more = {"houlsby": lambda: f(p["ffn"], gelu, y), "pfeiffer": lambda: f(p["ffn"], lambda u: np.maximum(u, 0), y + x),
            "parallel": lambda: 4 * f(p["ffn"], lambda u: np.maximum(u, 0), x),
            "parallel normed": lambda: 4 * f(p["ffn"], lambda u: np.maximum(u, 0), norm(p["second"], x))}
    return x + y + more[kind]()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel", "parallel normed"])
def test_equations_on_a_foreign_model_in_numpy(kind):
    given = dict(FOREIGN)
    if kind == "houlsby":
        given.pop("norm_modules")
    make = {"houlsby": houlsby, "pfeiffer": pfeiffer}.get(kind, parallel_adapter)
    method = make(**given, **({"original_ln_before": True} if kind == "parallel normed" else {}))
    base = Sublayers().init(jax.random.key(0), X)["params"]
    params = properties.moved(method, method.init(jax.random.key(1), base, kernel_axes(Sublayers(), base, X)))
    ours = jax.jit(bind(method, Sublayers()))({"params": params}, X)
    np.testing.assert_allclose(ours, written_out(jax.tree.map(np.asarray, params), kind), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("before", [False, True])
def test_norms_that_come_last(before):
    """Adapted at the norm itself: norm(v + f(v)), and with original_ln_before norm(v + f(norm(v)))."""

    class PostNorm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(name="LayerNorm")(x + nn.Dense(6, name="dense")(x))

    base = PostNorm().init(jax.random.key(0), X)["params"]
    method = pfeiffer(2, original_ln_before=before, output_modules=("LayerNorm",))
    params = properties.moved(method, method.init(jax.random.key(1), base))
    p = jax.tree.map(np.asarray, params)
    v = X + dense(p["dense"], X)
    u = norm(p["LayerNorm"], v) if before else v
    expected = norm(p["LayerNorm"], v + branch(p["LayerNorm"], lambda x: np.maximum(x, 0), u))
    np.testing.assert_allclose(jax.jit(bind(method, PostNorm()))({"params": params}, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [houlsby, pfeiffer])
def test_from_the_start_of_mam_adapters_they_are_the_base(peer_bases, make):
    """How near to it their own starts are is in test_every_method.py."""
    properties.check_start_is_base(make(4, init_weights="mam_adapter"), *peer_bases["qwen2"][1:], peer.IDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_layers_left_out_are_the_base(peer_bases, name):
    """Where the switch is zero the model is the base bit for bit, and no element counts."""
    _, model, base = peer_bases["llama"]
    method = METHODS[{"parallel": "parallel_adapter"}.get(name, name)](2, leave_out=(0, 2))
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    held = [leaf for path, leaf in flatten(partition(tuned, method.labels(tuned))[0]).items() if "/" in path]
    assert method.padding(tuned) == 2 * peft_jax.count(held) // 3
    switches = {path: leaf for path, leaf in flatten(tuned).items() if path.endswith("adapter_scaling")}
    assert all((np.asarray(leaf) != 0).tolist() == [False, True, False] for leaf in switches.values())
    off = combine(tuned, unflatten({path: jnp.zeros_like(leaf) for path, leaf in switches.items()}))
    assert np.array_equal(peer.bound_logits(method, model, off), np.asarray(peer.forward(model, base)))


def test_what_the_file_says(peer_bases, tmp_path):
    from safetensors.numpy import load_file

    _, model, base = peer_bases["llama"]
    method = houlsby(4, leave_out=(1,), modules_to_save=("norm",))
    save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert held["base_model.model.model.layers.0.mlp.adapter_down.weight"].shape == (4, 16)
    assert "base_model.model.model.layers.2.self_attn.adapter_up.bias" in held
    assert not any("layers.1" in key and "adapter" in key for key in held)
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stated["peft_type"] == "BOTTLENECK" and stated["leave_out"] == [1] and stated["is_parallel"] is False
    assert set(inspect.signature(bottleneck).parameters) <= set(stated)
    stated["use_gating"] = True
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
    with pytest.raises(PeftJaxError, match="asks for use_gating=True"):
        load_adapter(tmp_path, base)


def test_foreign_models_save_and_load(tmp_path):
    base = Sublayers().init(jax.random.key(0), X)["params"]
    method = pfeiffer(**FOREIGN, mh_adapter=True)
    axes = kernel_axes(Sublayers(), base, X)
    tuned = properties.moved(method, method.init(jax.random.key(0), base, axes))
    save_adapter(tmp_path, method, Sublayers(), tuned)
    _, loaded = load_adapter(tmp_path, base, axes)
    jax.tree.map(np.testing.assert_array_equal, loaded, tuned)


def test_half_precision_modules_compute_the_adapter_in_their_own_dtype(peer_bases):
    _, model, base = peer_bases["llama"]
    half = model.clone(dtype=jnp.bfloat16)
    for method in EVERY.values():
        tuned = method.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base))
        tuned = properties.moved(method, tuned)
        assert jax.eval_shape(bind(method, half), {"params": tuned}, peer.IDS).dtype == jnp.bfloat16
        trainable, _ = partition(tuned, method.labels(tuned))
        assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_dropout_acts_where_a_stream_is_given(peer_bases):
    _, model, base = peer_bases["llama"]
    method = bottleneck(dropout=0.5)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    apply = jax.jit(bind(method, model))
    plain = apply({"params": params}, peer.IDS)
    assert np.array_equal(plain, peer.bound_logits(bottleneck(), model, params))
    one, other = (apply({"params": params}, peer.IDS, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert not np.array_equal(one, plain) and not np.array_equal(one, other)


def test_decoding_with_a_cache_is_the_whole_pass(peer_bases):
    _, model, base = peer_bases["llama"]
    method = parallel_adapter()
    params = properties.moved(method, method.init(jax.random.key(0), base))
    apply = jax.jit(partial(bind(method, model), mutable=["cache"]))
    cache, out = model.init_cache(2, 10), []
    for start, end in ((0, 5), (5, 10)):
        logits, state = apply({"params": params, "cache": cache}, peer.IDS[:, start:end])
        cache, out = state["cache"], [*out, logits]
    np.testing.assert_allclose(np.concatenate(out, 1), peer.bound_logits(method, model, params), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_chains(peer_bases, tmp_path):
    """With methods that act on kernels: either order is the same model, saved in one file."""
    _, model, base = peer_bases["qwen2"]
    for other in (lora(r=2), ia3()):
        method = chain(houlsby(4), other)
        tuned = properties.moved(method, method.init(jax.random.key(0), base))
        ours = peer.bound_logits(method, model, tuned)
        assert np.array_equal(ours, peer.bound_logits(chain(other, houlsby(4)), model, tuned))
        save_adapter(tmp_path / other.config["peft_type"], method, model, tuned)
        peer.check_same_bits(model, base, method, tuned, tmp_path / other.config["peft_type"])


@pytest.mark.parametrize("first", EVERY)
def test_two_of_them_on_one_tree_are_an_error(peer_bases, first):
    with pytest.raises(PeftJaxError, match=r"already hold bottleneck adapters \('layers/.*one tree takes one kind"):
        chain(EVERY[first], parallel_adapter()).init(jax.random.key(0), peer_bases["llama"][2])


ERRORS = {
    "non_linearity='gleu'": lambda: houlsby(non_linearity="gleu"),
    "bottleneck_size=0": lambda: houlsby(bottleneck_size=0),
    "reduction_factor=-1": lambda: pfeiffer(-1),
    "scaling='lerned'": lambda: parallel_adapter(scaling="lerned"),
    "scaling=0": lambda: parallel_adapter(scaling=0),
    "both False": lambda: pfeiffer(output_adapter=False),
    "init_weights='bort'": lambda: pfeiffer(init_weights="bort"),
    "dropout=1": lambda: houlsby(dropout=1),
    "leave_out=.*numbers of layers": lambda: houlsby(leave_out="one"),
    "hidden_size=0": lambda: houlsby(hidden_size=0),
    "phm_dim=0": lambda: compacter(phm_dim=0),
}
INIT_ERRORS = {
    r"output_modules has 'mlpp', which is no module of this model: did you mean mlp\?":
        lambda: houlsby(output_modules=("mlpp",)),
    "leave_out has 3, which is no layer: they are numbered from 0 to 2": lambda: houlsby(leave_out=(3,)),
    "leaves no layer to adapt": lambda: houlsby(leave_out=(0, 1, 2)),
    "phm_dim=3 does not divide the width 16": lambda: compacter(2, phm_dim=3),
    "'layers' has 7 kernels, .*hidden_size=": lambda: houlsby(output_modules=("layers.0", "layers.1", "layers.2"),
                                                              mh_adapter=False, output_adapter=True),
    "modules_to_save has 'nrm'": lambda: houlsby(modules_to_save="nrm"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_values_that_cannot_be_meant(message):
    with pytest.raises(PeftJaxError, match=message):
        ERRORS[message]()


@pytest.mark.parametrize("message", INIT_ERRORS)
def test_what_init_refuses(peer_bases, message):
    with pytest.raises(PeftJaxError, match=message):
        INIT_ERRORS[message]().init(jax.random.key(0), peer_bases["llama"][2])


def test_what_the_forward_pass_refuses(peer_bases):
    _, model, base = peer_bases["llama"]
    method = pfeiffer(norm_modules=("ln_1",))
    with pytest.raises(PeftJaxError, match="no module of norm_modules was called before it"):
        bind(method, model)({"params": method.init(jax.random.key(0), base)}, peer.IDS)
    method = houlsby(hidden_size=8)
    with pytest.raises(PeftJaxError, match="has 16 channels, its adapter 8: give init the hidden_size"):
        bind(method, model)({"params": method.init(jax.random.key(0), base)}, peer.IDS)


@pytest.mark.parametrize("name", ["bottleneck", "compacter", "houlsby", "parallel_adapter", "pfeiffer"])
def test_the_configuration_has_the_defaults_of_the_function(name):
    told = dict(method_config(name))
    told.pop("name")
    assert told == {key: p.default for key, p in inspect.signature(METHODS[name]).parameters.items()}
