"""Bottleneck adapters: their equations, their place in AdapterHub's models, their promises, their files."""

import inspect
import json
from pathlib import Path

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
from peft_jax.hub.names import tensors
from tests import peer, properties

pytestmark = pytest.mark.usefixtures("quick_compiles")

# The methods whose arguments say the same as those of the cases in tests/golden/make_adapters.py.
CASES = {
    "houlsby": houlsby(4, "swish"),
    "houlsby-options": houlsby(4, ln_before=True, ln_after=True, scaling="learned", leave_out=1),
    "pfeiffer": pfeiffer(4),
    "pfeiffer-both": pfeiffer(4, "tanh", mh_adapter=True, scaling=2.0),
    "parallel": parallel_adapter(),
    "parallel-options": parallel_adapter(2, "leakyrelu", mh_adapter=True, ln_before=True, ln_after=True,
                                         scaling="channel"),
    "compacter": compacter(2),
    "compacter-plus-plus": compacter(2, phm_dim=2, factorized_phm_rule=True, phm_rank=3, mh_adapter=False,
                                     original_ln_before=True),
    "compacter-unshared": compacter(2, phm_dim=2, shared_phm_rule=False, phm_bias=False, factorized_phm_W=False),
}
PLAIN = {"houlsby": houlsby(4), "pfeiffer": pfeiffer(4), "parallel": parallel_adapter()}
MAM = {"houlsby": houlsby(4, init_weights="mam_adapter"), "pfeiffer": pfeiffer(4, init_weights="mam_adapter"),
       "parallel": parallel_adapter()}
EVERY = {**PLAIN, "compacter": compacter(2)}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(Path(__file__).parents[1] / "golden" / "adapters.npz"))


def file_keys(case, key):
    """A name of AdapterHub's as our file has it."""
    key = key.replace(f".adapters.{case}.", ".").replace(f"shared_parameters.{case}.", "")
    key = key.replace("attention_adapters", "self_attn").replace("output_adapters", "mlp").removeprefix("model.")
    key = key.replace(".adapter_down.0.", ".adapter_down.").replace(".adapter_down.1.", ".adapter_down.")
    key = key.removesuffix("scaling") + "adapter_scale" if key.endswith(".scaling") else key
    return "base_model.model." + (f"model.{key}" if key.startswith("layers") else key)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_adapterhubs(golden, peer_bases, case, tmp_path):
    """Its tensors, under our file's names, load here and give its logits: placement, equation and file in one."""
    from safetensors.numpy import save_file

    _, model, shapes = peer_bases["llama"]
    places = tensors(list(flatten(shapes)), 3)
    base = {path: np.zeros(leaf.shape, np.float32) for path, leaf in flatten(shapes).items()}
    for key, place in places.items():
        value = golden[f"base/{key}"]
        base[place.path][slice(None) if place.layer is None else place.layer] = value.T if place.transposed else value
    base = jax.tree.map(jnp.asarray, unflatten(base))
    method = CASES[case]
    save_adapter(tmp_path, method, method.init(jax.random.key(0), base), model)
    held = {file_keys(case, key.removeprefix(f"{case}/")): value for key, value in golden.items()
            if key.startswith(f"{case}/") and not key.endswith("/logits")}
    save_file({key: np.ascontiguousarray(value) for key, value in held.items()}, tmp_path / "adapter_model.safetensors")
    again, params = load_adapter(tmp_path, base)
    peer.assert_close(peer.bound_logits(again, model, params), golden[f"{case}/logits"])
    trainable, _ = partition(params, again.labels(params))
    assert peft_jax.count(trainable) - again.padding(params) == sum(value.size for value in held.values())


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(__import__("math").erf)(x / np.sqrt(2)))


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


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel", "parallel normed"])
def test_equations_on_a_foreign_model_in_numpy(kind):
    given = dict(FOREIGN)
    if kind == "houlsby":
        given.pop("norm_modules")
    make = {"houlsby": houlsby, "pfeiffer": pfeiffer}.get(kind, parallel_adapter)
    method = make(**given, **({"original_ln_before": True} if kind == "parallel normed" else {}))
    base = Sublayers().init(jax.random.key(0), X)["params"]
    params = properties.moved(method, method.init(jax.random.key(1), base, kernel_axes(Sublayers(), base, X)))
    ours = bind(method, Sublayers())({"params": params}, X)
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
    np.testing.assert_allclose(bind(method, PostNorm())({"params": params}, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_the_promises_of_a_method(peer_bases, name):
    _, model, base = peer_bases["qwen2"]
    properties.check_training(PLAIN[name], model, base, peer.IDS)
    properties.check_remat(PLAIN[name], model, base, peer.IDS)
    properties.check_start_is_base(MAM[name], model, base, peer.IDS)
    assert PLAIN[name].merge is None


@pytest.mark.parametrize("name", ["houlsby", "compacter"])
def test_the_start_is_near_the_base(peer_bases, name):
    _, model, base = peer_bases["llama"]
    method = EVERY[name]
    ours = peer.bound_logits(method, model, method.init(jax.random.key(0), base))
    peer.assert_close(ours, np.asarray(peer.forward(model, base)), 1e-3)


@pytest.mark.parametrize("name", EVERY)
def test_layers_left_out_are_the_base(peer_bases, name):
    """All but one: then the model is the base with that one; none of their elements count."""
    _, model, base = peer_bases["llama"]
    method = METHODS[{"parallel": "parallel_adapter"}.get(name, name)](2, leave_out=(0, 2))
    before = method.init(jax.random.key(0), base)
    tuned = properties.moved(method, before)
    assert method.padding(tuned) * 3 == 2 * sum(
        leaf.size for path, leaf in flatten(tuned).items()
        if method.labels and flatten(method.labels(tuned))[path] != "frozen" and "/" in path)
    off = jax.tree.map(lambda leaf: leaf, tuned)
    for path, leaf in flatten(off).items():
        if path.endswith("adapter_scaling"):
            assert (np.asarray(leaf) != 0).tolist() == [False, True, False]
            off = combine(off, unflatten({path: jnp.zeros_like(leaf)}))
    assert np.array_equal(peer.bound_logits(method, model, off), np.asarray(peer.forward(model, base)))


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_are_the_same_bits(peer_bases, case, tmp_path):
    _, model, base = peer_bases["qwen2"]
    method = CASES[case]
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, tuned, model)
    peer.check_same_bits(base, method, tuned, tmp_path)
    again, loaded = load_adapter(tmp_path, base)
    assert again.config == method.config
    assert np.array_equal(peer.bound_logits(again, model, loaded), peer.bound_logits(method, model, tuned))


def test_what_the_file_says(peer_bases, tmp_path):
    from safetensors.numpy import load_file

    _, model, base = peer_bases["llama"]
    method = houlsby(4, leave_out=(1,), modules_to_save=("norm",))
    save_adapter(tmp_path, method, method.init(jax.random.key(0), base), model)
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
    save_adapter(tmp_path, method, tuned, Sublayers())
    _, loaded = load_adapter(tmp_path, base, axes)
    jax.tree.map(np.testing.assert_array_equal, loaded, tuned)


def test_half_precision_modules_compute_the_adapter_in_their_own_dtype(peer_bases):
    _, model, base = peer_bases["llama"]
    half = model.clone(dtype=jnp.bfloat16)
    for method in EVERY.values():
        tuned = method.init(jax.random.key(0), jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base))
        tuned = properties.moved(method, tuned)
        assert bind(method, half)({"params": tuned}, peer.IDS).dtype == jnp.bfloat16
        trainable, _ = partition(tuned, method.labels(tuned))
        assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}


def test_dropout_acts_where_a_stream_is_given(peer_bases):
    _, model, base = peer_bases["llama"]
    method = bottleneck(dropout=0.5)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    apply = jax.jit(bind(method, model))
    plain = apply({"params": params}, peer.IDS)
    assert np.array_equal(plain, bind(bottleneck(), model)({"params": params}, peer.IDS))
    one, other = (apply({"params": params}, peer.IDS, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert not np.array_equal(one, plain) and not np.array_equal(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_decoding_with_a_cache_is_the_whole_pass(peer_bases, name):
    _, model, base = peer_bases["llama"]
    method = EVERY[name]
    params = properties.moved(method, method.init(jax.random.key(0), base))
    apply, cache, out = bind(method, model), model.init_cache(2, 10), []
    for start, end in ((0, 7), (7, 10)):
        logits, state = apply({"params": params, "cache": cache}, peer.IDS[:, start:end], mutable=["cache"])
        cache, out = state["cache"], [*out, logits]
    np.testing.assert_allclose(np.concatenate(out, 1), peer.bound_logits(method, model, params), rtol=1e-4, atol=1e-5)


def test_chains(peer_bases, tmp_path):
    """With methods that act on kernels: either order is the same model, trains, and is saved in one file."""
    _, model, base = peer_bases["qwen2"]
    for other in (lora(r=2), ia3()):
        method = chain(houlsby(4), other)
        properties.check_training(method, model, base, peer.IDS)
        tuned = properties.moved(method, method.init(jax.random.key(0), base))
        ours = peer.bound_logits(method, model, tuned)
        assert np.array_equal(ours, peer.bound_logits(chain(other, houlsby(4)), model, tuned))
        save_adapter(tmp_path / other.config["peft_type"], method, tuned, model)
        again, loaded = load_adapter(tmp_path / other.config["peft_type"], base)
        assert np.array_equal(ours, peer.bound_logits(again, model, loaded))


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
    "leave_out='one'": lambda: houlsby(leave_out="one"),
    "hidden_size=0": lambda: houlsby(hidden_size=0),
    "phm_dim=0": lambda: compacter(phm_dim=0),
}
INIT_ERRORS = {
    r"output_modules has 'mpl', which is no module of this model: did you mean mlp\?":
        lambda: houlsby(output_modules=("mpl",)),
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
