"""LoRA on a Linen model that this project did not write: flax's own attention, looped and scanned."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import PeftJaxError, bind, flatten, kernel_axes, load_adapter, lora, save_adapter, unflatten
from peft_jax.core.kernel_axes import KernelAxes

WIDTH, HEADS, DEPTH = 12, 3, 2


class Block(nn.Module):
    """A pre-norm encoder block; its attention keeps kernels (WIDTH, HEADS, 4) and (HEADS, 4, WIDTH)."""

    @nn.compact
    def __call__(self, x, _=None):
        attend = nn.MultiHeadDotProductAttention(HEADS, name="attention")
        x = x + attend(nn.LayerNorm(name="before")(x))
        y = nn.gelu(nn.Dense(2 * WIDTH, name="up")(nn.LayerNorm(name="between")(x)))
        return x + nn.Dense(WIDTH, name="down")(y), None


class Encoder(nn.Module):
    """``scanned``: one remat'ed block under nn.scan, else a Python loop. ``streams``: what the scan splits."""

    scanned: bool
    streams: tuple[str, ...] = ("params", "dropout")

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            body = nn.scan(nn.remat(Block, prevent_cse=False), variable_axes={"params": 0}, length=DEPTH,
                           split_rngs=dict.fromkeys(self.streams, True))  # fmt: skip
            x, _ = body(name="layers")(x, None)
        else:
            for i in range(DEPTH):
                x, _ = Block(name=f"layers_{i}")(x)
        return nn.Dense(5, name="score")(nn.LayerNorm(name="norm")(x))


X = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))
TARGETS = ("query", "value", "out", "up", "score")


@pytest.fixture(scope="module", params=[False, True], ids=["looped", "scanned"])
def encoder(request):
    """(model, params, kernel axes)."""
    model = Encoder(request.param)
    params = jax.jit(model.init)(jax.random.key(1), X)["params"]
    return model, params, kernel_axes(model, params, X)


@partial(jax.jit, static_argnums=0)
def forward(model, params):
    return model.apply({"params": params}, X)


def method_of(**options):
    return lora(**{"r": 2, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False, **options})


def layer_of(params, i):
    if "layers" in params:
        return jax.tree.map(lambda leaf: np.asarray(leaf[i]), params["layers"])
    return jax.tree.map(np.asarray, params[f"layers_{i}"])


def norm(x, leaves):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * leaves["scale"] + leaves["bias"]


def dense(x, leaves, inputs):
    """x W + b + s (x A) B, with ``inputs`` axes contracted, written out by einsum."""
    i, o = "hd"[-inputs:] if inputs == 2 else "i", "xy"[:leaves["kernel"].ndim - inputs]
    y = np.einsum(f"bt{i},{i}{o}->bt{o}", x, leaves["kernel"]) + leaves["bias"]
    if "lora_a" in leaves:
        down = np.einsum(f"bt{i},{i}r->btr", x, leaves["lora_a"])
        y = y + leaves["lora_scaling"] * np.einsum(f"btr,r{o}->bt{o}", down, leaves["lora_b"])
    return y


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_hand(params):
    """The encoder with its adapters in plain numpy."""
    x = np.asarray(X)
    for i in range(DEPTH):
        leaves = layer_of(params, i)
        attention, y = leaves["attention"], norm(x, leaves["before"])
        query, key, value = (dense(y, attention[name], 1) for name in ("query", "key", "value"))
        weights = softmax(np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(WIDTH // HEADS))
        x = x + dense(np.einsum("bhqk,bkhd->bqhd", weights, value), attention["out"], 2)
        hidden = np.asarray(nn.gelu(dense(norm(x, leaves["between"]), leaves["up"], 1)))
        x = x + dense(hidden, leaves["down"], 1)
    return dense(norm(x, params["norm"]), jax.tree.map(np.asarray, params["score"]), 1)


@pytest.mark.slow
def test_axes_of_every_kernel(encoder):
    model, _, axes = encoder
    path, stack = ("layers", (DEPTH,)) if model.scanned else ("layers_1", ())
    assert axes[f"{path}/attention/query/kernel"] == KernelAxes("DenseGeneral", stack, (WIDTH,), (HEADS, 4))
    assert axes[f"{path}/attention/out/kernel"] == KernelAxes("DenseGeneral", stack, (HEADS, 4), (WIDTH,))
    assert axes[f"{path}/up/kernel"] == KernelAxes("Dense", stack, (WIDTH,), (2 * WIDTH,))
    assert axes["score/kernel"] == KernelAxes("Dense", (), (WIDTH,), (5,))


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {"rank_pattern": {"layers.0.attention.query": 4}, "alpha_pattern": {"layers.1.attention.out": 7}},
    {"layers_to_transform": 1, "exclude_modules": ("score",)},
], ids=["patterns", "one layer"])  # fmt: skip
def test_lora_equals_numpy_and_its_merged_weights(encoder, options):
    model, base, axes = encoder
    method = method_of(**options)
    params = method.init(jax.random.key(2), base, axes=axes)
    tuned = np.asarray(jax.jit(bind(method, model))({"params": params}, X))
    assert np.abs(tuned - np.asarray(forward(model, base))).max() > 0.05
    np.testing.assert_allclose(tuned, by_hand(params), rtol=1e-4, atol=1e-5)
    merged = method.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(forward(model, merged), tuned, rtol=1e-4, atol=1e-5)


def test_ranks_and_shapes_of_multi_dimensional_kernels(encoder):
    model, base, axes = encoder
    method = method_of(rank_pattern={"layers.0.attention.query": 4})
    flat = flatten(method.init(jax.random.key(2), base, axes=axes))
    if model.scanned:
        assert flat["layers/attention/query/lora_a"].shape == (DEPTH, WIDTH, 4)
        assert flat["layers/attention/query/lora_b"].shape == (DEPTH, 4, HEADS, 4)
        assert flat["layers/attention/out/lora_a"].shape == (DEPTH, HEADS, 4, 2)
        assert method.padding(unflatten(flat)) == 2 * (WIDTH + HEADS * 4)
    else:
        assert flat["layers_0/attention/query/lora_b"].shape == (4, HEADS, 4)
        assert flat["layers_1/attention/query/lora_b"].shape == (2, HEADS, 4)
        assert method.padding(unflatten(flat)) == 0


@pytest.mark.slow
def test_the_start_is_the_base_model_bit_for_bit(encoder):
    model, base, axes = encoder
    method = method_of(init_lora_weights=True)
    params = method.init(jax.random.key(2), base, axes=axes)
    np.testing.assert_array_equal(bind(method, model)({"params": params}, X), model.apply({"params": base}, X))


@pytest.mark.slow
def test_gradients_reach_every_leaf(encoder):
    model, base, axes = encoder
    method = method_of()
    params = method.init(jax.random.key(2), base, axes=axes)
    apply = bind(method, model)
    gradients = flatten(jax.jit(jax.grad(lambda p: (apply({"params": p}, X) ** 2).mean()))(params))
    for path, label in flatten(method.labels(params)).items():
        assert label == "frozen" or np.asarray(gradients[path]).any(), path


def test_plain_names_there_and_back(encoder, tmp_path):
    model, base, axes = encoder
    method = method_of(rank_pattern={"layers.0.attention.query": 4}, bias="all", modules_to_save=("norm",))
    params = method.init(jax.random.key(2), base, axes=axes)
    save_adapter(tmp_path, method, model, params)
    again, loaded = load_adapter(tmp_path, base, axes=axes)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert flatten(again.labels(loaded)) == flatten(method.labels(params))


@pytest.mark.slow
def test_dropout_draws_in_every_layer_or_says_why_not(encoder):
    model, base, axes = encoder
    method = method_of(lora_dropout=0.5)
    params, rngs = method.init(jax.random.key(2), base, axes=axes), {"dropout": jax.random.key(3)}
    plain = bind(method, model)({"params": params}, X)
    assert not np.allclose(bind(method, model)({"params": params}, X, rngs=rngs), plain)
    if model.scanned:
        withheld = model.clone(streams=("params",))
        np.testing.assert_array_equal(bind(method, withheld)({"params": params}, X), plain)
        with pytest.raises(PeftJaxError, match=r"lora_dropout=0\.5 cannot draw in 'layers/.*split_rngs"):
            bind(method, withheld)({"params": params}, X, rngs=rngs)


@pytest.mark.slow
def test_without_axes_a_multi_dimensional_kernel_is_an_error(encoder):
    model, base, _ = encoder
    message = "kernel of 4 axes.*kernel_axes" if model.scanned else "taken for a stack of .*kernel_axes"
    with pytest.raises(PeftJaxError, match=message):
        bind(method_of(), model)({"params": method_of().init(jax.random.key(2), base)}, X)


class Strange(nn.Module):
    """A convolution, and a Dense that some calls leave out."""

    @nn.compact
    def __call__(self, x, everything=True):
        x = nn.Conv(WIDTH, (3,), name="conv")(x)
        y = nn.Dense(4, name="used")(x)
        return y + nn.Dense(4, name="sometimes")(x) if everything else y


@pytest.fixture(scope="module")
def strange():
    model = Strange()
    return model, model.init(jax.random.key(0), X)["params"]


@pytest.mark.slow
def test_a_convolution_is_a_clear_error(strange):
    model, params = strange
    axes = kernel_axes(model, params, X)
    with pytest.raises(PeftJaxError, match="'conv' is a Conv of unknown input and output axes: exclude it"):
        lora(target_modules=("conv",)).init(jax.random.key(0), params, axes=axes)
    forced = {**axes, "conv/kernel": KernelAxes("Conv", (), (3, WIDTH), (WIDTH,))}
    method = lora(target_modules=("conv",))
    tuned = method.init(jax.random.key(0), params, axes=forced)
    with pytest.raises(PeftJaxError, match="'conv' is a Conv: LoRA changes Dense and DenseGeneral modules only"):
        bind(method, model)({"params": tuned}, X)


def test_a_module_the_pass_leaves_out_is_an_error(strange):
    model, params = strange
    method = lora(target_modules=("used", "sometimes"))
    with pytest.raises(PeftJaxError, match="'sometimes' is a module that the traced pass never called"):
        method.init(jax.random.key(0), params, axes=kernel_axes(model, params, X, everything=False))
    tuned = method.init(jax.random.key(0), params, axes=kernel_axes(model, params, X))
    with pytest.raises(PeftJaxError, match="never reads 2 trainable leaves, the first is 'sometimes/lora_a'"):
        bind(method, model)({"params": tuned}, X, everything=False)


@pytest.mark.slow
def test_a_leaf_beside_a_module_that_is_not_there_is_an_error_under_scan():
    model = Encoder(scanned=True)
    base = model.init(jax.random.key(1), X)["params"]
    axes = kernel_axes(model, base, X)
    method = method_of(target_modules=("up",))
    params = method.init(jax.random.key(2), base, axes=axes)
    params["layers"]["ghost"] = {name: params["layers"]["up"][name] for name in ("lora_a", "lora_b", "lora_scaling")}
    with pytest.raises(PeftJaxError, match="never reads 2 trainable leaves, the first is 'layers/ghost/lora_a'"):
        bind(method, model)({"params": params}, X)


@pytest.mark.slow
def test_half_precision_modules_compute_the_branch_in_their_own_dtype():
    class Wrap(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral((2, 3), dtype=jnp.bfloat16, name="wrap")(x)

    base = Wrap().init(jax.random.key(0), X)["params"]
    method = lora(r=2, target_modules=("wrap",), init_lora_weights=False)
    params = method.init(jax.random.key(1), base, axes=kernel_axes(Wrap(), base, X))
    out = bind(method, Wrap())({"params": params}, X)
    assert (out.dtype, out.shape) == (jnp.bfloat16, (2, 6, 2, 3))
    assert params["wrap"]["lora_a"].dtype == jnp.float32
