"""DoRA: its options, the paper's equation in numpy, and its exchange with real peft."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, bind, dora, flatten
from tests import peer, properties
from tests.properties import moved

peft = pytest.importorskip("peft")

# name: (base, LoraConfig's arguments beside use_dora). The same words make the adapter here and in peft.
CASES = {
    "biases": ("qwen2", {"r": 2, "lora_alpha": 5, "target_modules": "all-linear", "bias": "lora_only"}),
    "patterns": ("llama", {"r": 2, "rank_pattern": {"layers.1.self_attn.q_proj": 4}, "use_rslora": True,
                           "target_modules": ["q_proj", "down_proj"]}),
    "some layers": ("qwen2", {"r": 2, "layers_to_transform": [0, 2], "modules_to_save": ["norm"]}),
    "tied head": ("tied", {"r": 2, "target_modules": ["v_proj", "lm_head"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "tied head"])
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    name, options = CASES[case]
    base, method = peer_bases[name], dora(**options)
    peer.check_opens_in_peft(base, method, tmp_path / "adapter", 1e-5, peer.trained_here(base) if case == "patterns"
                             else moved)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    name, options = CASES[case]
    config = peft.LoraConfig(task_type="CAUSAL_LM", use_dora=True, **options)
    peer.check_loads_from_peft(peer_bases[name], config, tmp_path, relative=1e-5)


@pytest.mark.slow
def test_the_gradient_is_peft_s(peer_bases):
    """The norm counts as a constant: else the gradients of A and B would differ. Dropout is off."""
    import torch

    fresh, model, base = peer_bases["qwen2"]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False,
                                                          task_type="CAUSAL_LM"))
    logits = theirs(torch.tensor(peer.IDS)).logits
    (logits * logits).mean().backward()
    by_name = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}

    method = dora(r=2, init_lora_weights=False)
    params = flatten(method.init(jax.random.key(0), base))
    names = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight",
             "lora_magnitude": "lora_magnitude_vector.default.weight"}
    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}

    def stacked(values, module, leaf):
        found = [values[f"base_model.model.model.layers.{i}.self_attn.{module}.{names[leaf]}"] for i in range(3)]
        return np.stack([one.T for one in found])

    paths = [(module, leaf) for module in ("q_proj", "v_proj") for leaf in names]
    given = {f"layers/self_attn/{module}/{leaf}": stacked(state, module, leaf) for module, leaf in paths}

    def loss(trained):
        return (bind(method, model)({"params": peft_jax.unflatten(params | trained)}, peer.IDS) ** 2).mean()

    for (module, leaf), gradient in zip(paths, jax.jit(jax.grad(loss))(given).values(), strict=True):
        expected = stacked(by_name, module, leaf)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_dense_general_written_out_in_numpy():
    model, x, base, axes = properties.generals()
    method = dora(r=2, lora_alpha=3, target_modules=("split", "out"))
    params = moved(method, method.init(jax.random.key(0), base, axes))

    def kernel(leaves, inputs):
        whole = leaves["kernel"] + 1.5 * np.tensordot(leaves["lora_a"], leaves["lora_b"], 1)
        return leaves["lora_magnitude"] / np.sqrt((whole**2).sum(inputs)) * whole

    split, out = params["split"], params["out"]
    mixed = np.einsum("bit,iac->btac", x, kernel(split, 0)) + split["bias"]
    expected = np.einsum("btac,aco->bto", mixed, kernel(out, (0, 1))) + out["bias"]
    np.testing.assert_allclose(bind(method, model)({"params": params}, x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [False, True])
def test_dropout_reaches_the_rescaled_base_as_in_peft(dropped):
    """With the input whole the pass is undropped; with it dropped the base enters twice, once whole, once dropped."""
    model, x = nn.Dense(3), np.ones((1, 400), np.float32)
    base = {"layer": model.init(jax.random.key(0), x)["params"] | {"bias": np.arange(3.0)}}

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="layer")(x)

    method = dora(r=2, target_modules=("layer",), lora_dropout=0.25)
    params = moved(method, method.init(jax.random.key(0), base), by=0.05)
    apply = bind(method, Outer())
    if not dropped:
        np.testing.assert_allclose(apply({"params": params}, x), Outer().apply({"params": method.merge(params)}, x),
                                   rtol=1e-4, atol=1e-4)
        return
    draw = jax.jit(jax.vmap(lambda key: apply({"params": params}, x, rngs={"dropout": key})))
    many = np.asarray(draw(jax.random.split(jax.random.key(1), 200)))
    # Linear in the dropped input, so unbiased. Its deviation over 200 draws of 400 inputs bounds the error.
    error = many.mean(0) - apply({"params": params}, x)
    assert (np.abs(error) < 4 * many.std(0) / np.sqrt(200)).all() and (many.std(0) > 0).all()
    layer = params["layer"]
    ratio = layer["lora_magnitude"] / np.linalg.norm(layer["kernel"] + 4 * layer["lora_a"] @ layer["lora_b"], axis=0)
    whole = (ratio - 1) * layer["kernel"] + ratio * 4 * (layer["lora_a"] @ layer["lora_b"])
    spread = np.sqrt((np.asarray(whole) ** 2).sum(0) * 0.25 / 0.75)  # of the sum over inputs of ones, each kept 3 in 4
    np.testing.assert_allclose(many.std(0)[0], spread, rtol=0.2)


def test_counts_are_the_closed_form():
    """r (in + out) + out for each kernel, as peft prints for Llama-3.2-3B with r 32 on q and v."""
    shapes = {"q_proj": (28, 3072, 3072), "v_proj": (28, 3072, 1024)}
    base = {"layers": {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16)} for name, shape in shapes.items()}}
    method = dora(r=32)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), base)
    trained = peft_jax.count(peft_jax.partition(params, method.labels(params))[0])
    assert trained == 28 * (32 * (3072 + 3072 + 3072 + 1024) + 3072 + 1024)


def test_what_cannot_be_meant_is_an_error(peer_bases):
    base = peer_bases["llama"][2]
    with pytest.raises(PeftJaxError, match=r"alpha_pattern\['q_proj'\]=0 leaves nothing"):
        dora(alpha_pattern={"q_proj": 0})
    with pytest.raises(PeftJaxError, match="'embed_tokens', which matches no kernel"):
        dora(target_modules=("embed_tokens",)).init(jax.random.key(0), base)
    with pytest.raises(PeftJaxError, match="already hold LORA"):
        dora().init(jax.random.key(0), peft_jax.lora().init(jax.random.key(0), base))


@pytest.mark.slow
def test_a_lora_file_that_says_dora_lacks_the_magnitudes(peer_bases, tmp_path):
    _, model, base = peer_bases["llama"]
    method = peft_jax.lora(r=2, target_modules=("q_proj",))
    peft_jax.save_adapter(tmp_path, method, model, method.init(jax.random.key(0), base))
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    with pytest.raises(PeftJaxError, match=r"missing.*q_proj\.lora_magnitude_vector"):
        peft_jax.load_adapter(tmp_path, base)
