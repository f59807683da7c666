"""Quantised bases: what the model computes, merging, what cannot be. Methods on top are in test_every_method.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, QuantizedArray, bind, chain, flatten, kernel_axes, lora, quantize
from tests.peer import IDS, forward
from tests.properties import check_decoding, check_training, generals, moved

SMALL = {"block_size": 16}


@pytest.fixture(scope="module")
def tied(peer_bases):
    """(model, plain params, quantised params, the plain array of every leaf of them) of a tiny tied Llama."""
    _, model, base = peer_bases["tied"]
    method = quantize(**SMALL)
    held = method.init(None, base)
    return model, base, held, method.merge(held)


def test_only_the_layers_kernels_are_quantised_by_default(tied):
    _, base, held, plain = tied
    changed = {path for path, leaf in flatten(held).items() if isinstance(leaf, QuantizedArray)}
    assert changed == {path for path in flatten(base) if path.startswith("layers/") and path.endswith("/kernel")}
    for path, leaf in flatten(plain).items():
        assert (leaf.shape, leaf.dtype) == (flatten(base)[path].shape, flatten(base)[path].dtype)


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4", "int4_affine", "int8"])
@pytest.mark.parametrize("block_size", [32, None])
def test_each_type_computes_what_it_stands_for(tied, quant_type, block_size):
    model, base, _, _ = tied
    method = quantize(quant_type, block_size, True, ("mlp.up_proj", "embed_tokens", "o_proj"))
    held = method.init(None, base)
    assert isinstance(held["embed_tokens"]["embedding"], QuantizedArray)  # rows are looked up, and it is the head
    ours = jax.jit(bind(method, model))({"params": held}, IDS)
    expected = forward(model, method.merge(held))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected - forward(model, base)).max() > 0.01


def test_a_prompt_starts_from_rows_of_a_quantised_embedding(tied):
    _, base, _, _ = tied
    method = quantize("int8", 16, target_modules=("embed_tokens",))
    held = method.init(None, base)
    found = peft_jax.prompt(3, "TEXT", prompt_tuning_init_ids=(5, 1)).init(jax.random.key(0), held)
    rows = method.merge(held)["embed_tokens"]["embedding"][np.array([5, 1, 5])]
    np.testing.assert_array_equal(found["embed_tokens"]["prompt"], rows)


@pytest.mark.slow
def test_training_and_decoding_on_a_quantised_base(tied):
    model, base, _, _ = tied
    method = chain(quantize(double_quant=True, **SMALL), lora(r=2, target_modules="all-linear"))
    check_training(method, model, base, IDS)
    check_decoding(method, model, base, IDS)


@pytest.mark.slow
def test_a_saved_adapter_is_the_lora_alone_and_loads_on_a_quantised_base(tied, tmp_path):
    model, base, held, _ = tied
    method = chain(quantize(**SMALL), lora(r=2))
    tuned = moved(method, method.init(jax.random.key(0), base))
    peft_jax.save_adapter(tmp_path, method, model, tuned)
    loaded, params = peft_jax.load_adapter(tmp_path, held)
    assert loaded.config["peft_type"] == "LORA"
    ours, expected = (jax.jit(bind(one, model))({"params": p}, IDS) for one, p in ((loaded, params), (method, tuned)))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: lora(r=2), lambda: peft_jax.ia3(), lambda: peft_jax.ln_tuning()])
def test_merging_gives_plain_weights_where_nothing_is_adapted_either(tied, make):
    """As of a method that was loaded on a quantised base, which knows nothing of it."""
    model, _, held, _ = tied
    method = make()
    tuned = moved(method, method.init(jax.random.key(0), held))
    merged = method.merge(tuned)
    assert not any(isinstance(leaf, QuantizedArray) for leaf in flatten(merged).values())
    ours = jax.jit(bind(method, model))({"params": tuned}, IDS)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": merged}, IDS), ours, atol=1e-4 * np.abs(ours).max())


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_starts_nearer_to_the_base(tied, rounds, tmp_path):
    """arXiv 2310.08659, algorithm 1: less error than quantising alone, at each layer."""
    model, base, held, plain = tied
    start = lora(r=4, target_modules="all-linear", init_lora_weights="loftq",
                 loftq_config={"block_size": 16, "loftq_iter": rounds})
    method = chain(start, quantize(**SMALL))
    tuned = method.init(jax.random.key(0), base)
    for path, leaf in flatten(base).items():
        if isinstance(flatten(held)[path], QuantizedArray):
            error, alone = (np.square(flatten(tree)[path] - leaf).mean((1, 2)) for tree in (method.merge(tuned), plain))
            assert (error < 0.9 * alone).all()
    if rounds == 1:  # the base is what quantize makes of it, so the adapter is a plain one on that
        peft_jax.save_adapter(tmp_path, method, model, tuned)
        loaded, params = peft_jax.load_adapter(tmp_path, held)
        np.testing.assert_allclose(bind(loaded, model)({"params": params}, IDS), bind(method, model)(
            {"params": tuned}, IDS), atol=1e-5)
    else:
        with pytest.raises(PeftJaxError, match="save the whole model"):
            peft_jax.save_adapter(tmp_path, start, model, tuned)


def test_pissa_in_front_leaves_its_rest_to_be_quantised(tied):
    """QPiSSA: the error at the start is that of the rest, which is smaller than that of the whole kernel."""
    _, base, _, plain = tied
    method = chain(lora(r=8, target_modules=("up_proj",), init_lora_weights="pissa"),
                   quantize(block_size=16, target_modules=("up_proj",)))
    merged = method.merge(method.init(jax.random.key(0), base))
    error, alone = (np.square(tree["layers"]["mlp"]["up_proj"]["kernel"] - base["layers"]["mlp"]["up_proj"]["kernel"])
                    .mean() for tree in (merged, plain))
    assert error < 0.8 * alone


class Formulas(nn.Module):
    """An Einsum of one input and two output axes, and one of two input axes."""

    @nn.compact
    def __call__(self, x):
        """(2, 3, 32) -> (2, 3, 5)."""
        x = nn.Einsum((32, 4, 8), "btd,dnh->bnth", name="split")(x)
        return nn.Einsum((4, 8, 5), "...nth,nhd->...td", name="out")(x)


@pytest.mark.slow
def test_einsum_and_dense_general_kernels():
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    model = Formulas()
    params = model.init(jax.random.key(0), x)["params"]
    for net, given, base, axes in ((model, x, params, kernel_axes(model, params, x)), generals()):
        method = quantize(block_size=16, target_modules=("split", "out"))
        held = method.init(None, base, axes=axes)
        assert all(isinstance(held[name]["kernel"], QuantizedArray) for name in ("split", "out"))
        expected = net.apply({"params": method.merge(held)}, given)
        np.testing.assert_allclose(bind(method, net)({"params": held}, given), expected, atol=1e-5)
        assert kernel_axes(net, held, given) == axes


class Odd(nn.Module):
    """Formulas whose kernel's inputs do not stand in front, and a product of its own."""

    @nn.compact
    def __call__(self, x):
        """(2, 16) -> (2, 16)."""
        own = nn.Dense(16, dot_general=jax.lax.dot_general, name="own")(x)
        return own + nn.Einsum((4, 16, 4), "bd,ndh->bnh", name="turned")(x).reshape(own.shape)


def test_modules_that_cannot_be_read_are_errors():
    x = np.ones((2, 16), np.float32)
    params = Odd().init(jax.random.key(0), x)["params"]
    axes = kernel_axes(Odd(), params, x)
    with pytest.raises(PeftJaxError, match="'turned' is a Einsum of unknown input and output axes: exclude it"):
        quantize(block_size=16).init(None, params, axes=axes)
    method = quantize(block_size=16, exclude_modules=("turned",))
    with pytest.raises(PeftJaxError, match="'own' is a Dense whose product is its own"):
        bind(method, Odd())({"params": method.init(None, params, axes=axes)}, x)


@pytest.mark.slow
def test_what_cannot_be_is_an_error(tied):
    _, base, held, _ = tied
    key = jax.random.key(0)
    cases = [
        (lambda: quantize("nf5"), "quant_type=.nf5. is no data type"),
        (lambda: quantize(block_size=48), "block_size=48 is none of 16, 32"),
        (lambda: quantize(double_quant="yes"), "double_quant=.yes."),
        (lambda: quantize(target_modules=("up_prj",)).init(None, base), "up_proj"),
        (lambda: quantize(target_modules=None).init(None, base), "target_modules=None leaves no module to adapt"),
        (lambda: quantize("nf4", 16, exclude_modules=("layers.0.mlp.up_proj",)).init(None, base), "one leaf for 3"),
        (lambda: quantize(block_size=32).init(None, held), "is quantised already, with quant_type='nf4', b"),
        (lambda: peft_jax.full().init(key, held), "quantised .nf4. and cannot train"),
        (lambda: chain(peft_jax.full(), quantize(**SMALL)).init(key, base), "quantised .nf4. and cannot train"),
        (lambda: chain(peft_jax.full(last_n_layers=1), quantize(**SMALL)).init(key, base), "and cannot train: leave"),
        (lambda: chain(quantize(**SMALL), lora(modules_to_save=("up_proj",))).init(key, base), "cannot train"),
        (lambda: lora(init_lora_weights="pissa").init(key, held), "put the LoRA in front"),
        (lambda: lora(init_lora_weights="loftq", loftq_config={"rounds": 2}), "loftq_config..rounds.."),
        (lambda: lora(init_lora_weights="loftq", layers_to_transform=0).init(key, base), "'layers.1.*' gets no LoRA"),
        (lambda: quantize().init(None, {"up_proj": {"kernel": jnp.full((64, 2), jnp.nan)}}), "'up_proj/kernel'.*NaN"),
    ]
    for make, said in cases:
        with pytest.raises(PeftJaxError, match=said):
            make()


def test_quantised_again():
    """Zeros cost nothing, and errors say where."""
    method, ones = quantize(target_modules=("up_proj",)), {"up_proj": {"kernel": jnp.ones((64, 2))}}
    held = method.init(None, ones)
    zeros = {"up_proj": {"kernel": jnp.zeros((64, 2))}}
    assert peft_jax.requantize(zeros, held)[1] == {"up_proj/kernel": 0.0}
    for wrong, words in ((jnp.ones((64, 3)), "not the shape"), (jnp.full((64, 2), jnp.nan), "NaN")):
        with pytest.raises(PeftJaxError, match=f"'up_proj/kernel': .*{words}"):
            peft_jax.requantize({"up_proj": {"kernel": wrong}}, held)


@pytest.mark.slow
def test_a_head_that_is_untied_from_a_quantised_embedding_has_its_codes(tied):
    model, base, _, _ = tied
    method = quantize("int8", 16, target_modules=("embed_tokens",))
    held = method.init(None, base)
    untied = peft_jax.untie(held)
    assert untied["lm_head"]["kernel"].codes is held["embed_tokens"]["embedding"].codes
    ours, expected = (jax.jit(bind(method, model))({"params": params}, IDS) for params in (untied, held))
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("make", [peft_jax.prompt, lora])
def test_a_quantised_module_cannot_be_saved_as_a_whole(tied, make):
    method = make(modules_to_save=("up_proj",))
    with pytest.raises(PeftJaxError, match=r"up_proj/kernel' is quantised .nf4. and cannot train"):
        method.init(jax.random.key(0), tied[2])
