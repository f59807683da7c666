"""Merged equals adapted, or an error: a weight that the model reads elsewhere than in its own module's product."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import (  # fmt: skip
    PeftJaxError,
    adalora,
    bind,
    bitfit,
    chain,
    check_read,
    dora,
    full,
    hra,
    ia3,
    kernel_axes,
    loha,
    lokr,
    lora,
    miss,
    mix_adapters,
    oft,
    quantize,
    trainable_tokens,
    vera,
)
from tests.properties import moved

IDS = jnp.arange(6).reshape(2, 3)
ON = {"target_modules": ("wte", "up")}
SAID = "changed by a merge.*leave '{}' out"
NEVER = "never reads . trainable leaves, the first is '{}/.*such as a subclass with a product of its own"


class Embeds(nn.Module):
    """A language model whose head is made of its embedding as ``head`` says."""

    head: object
    make: object = nn.Dense

    @nn.compact
    def __call__(self, ids):
        wte = nn.Embed(7, 16, name="wte")
        h = self.make(16, name="up")(wte(ids))
        return self.head(self, wte, h)


class Parts(nn.Module):
    """Embeds, whose states can be had without the head."""

    def setup(self):
        self.wte, self.up = nn.Embed(7, 16), nn.Dense(16)

    def __call__(self, ids):
        return self.states(ids) @ self.wte.embedding.T

    def states(self, ids):
        """(batch, length) -> (batch, length, 16)."""
        return self.up(self.wte(ids))


def by_apply(model, wte, h):
    """As transformers' Flax models have it."""
    return nn.Dense(7, use_bias=False, parent=None).apply({"params": {"kernel": wte.embedding.T}}, h)


def by_jit(model, wte, h):
    return jax.jit(jnp.dot)(h, wte.embedding.T)


def by_branch(model, wte, h):
    return jax.lax.cond(h.sum() > 0, lambda h, table: h @ table.T, lambda h, table: h @ table.T + 1, h, wte.embedding)


def by_loop(model, wte, h):
    def body(state):
        turn, sums = state
        return turn + 1, sums + h @ wte.embedding.T

    return jax.lax.while_loop(lambda state: state[0] < 2, body, (0, jnp.zeros((*h.shape[:-1], 7))))[1]


def by_remat(model, wte, h):
    return jax.checkpoint(lambda h, table: h @ table.T)(h, wte.embedding)


def by_own_rule(model, wte, h):
    product = jax.custom_vjp(lambda h, table: h @ table.T)
    product.defvjp(lambda h, table: (h @ table.T, (h, table)), lambda kept, g: (g @ kept[1], kept[0]))
    return product(h, wte.embedding)


ELSEWHERE = {
    "attribute": lambda model, wte, h: h @ wte.embedding.T,
    "variables": lambda model, wte, h: h @ wte.variables["params"]["embedding"].T,
    "root": lambda model, wte, h: h @ model.variables["params"]["wte"]["embedding"].T,
    "apply": by_apply, "jit": by_jit, "branch": by_branch, "loop": by_loop, "remat": by_remat, "rule": by_own_rule,
    "output": lambda model, wte, h: (wte.attend(h), wte.embedding),
}  # fmt: skip


def started(method, model, *inputs):
    params = model.init(jax.random.key(0), *inputs)["params"]
    return moved(method, method.init(jax.random.key(1), params, axes=kernel_axes(model, params, *inputs)))


def check_refused(method, model, inputs, where, params=None, said=SAID):
    params = started(method, model, inputs) if params is None else params
    for wrapped in (lambda apply: apply, jax.jit):
        apply = wrapped(bind(method, model))
        for _ in range(2):
            with pytest.raises(PeftJaxError, match=said.format(where)):
                apply({"params": params}, inputs)


def check_same(method, model, *inputs, **options):
    """Merged equals adapted, and the method does something."""
    params = started(method, model, *inputs)
    ours = bind(method, model)({"params": params}, *inputs, **options)
    merged = model.apply({"params": method.merge(params)}, *inputs, **options)
    np.testing.assert_allclose(merged, ours, atol=1e-4 * np.abs(ours).max())
    base = model.init(jax.random.key(0), *inputs)["params"]
    assert not np.allclose(model.apply({"params": base}, *inputs, **options), ours, atol=1e-2 * np.abs(ours).max())


@pytest.mark.slow
@pytest.mark.parametrize("how", ELSEWHERE)
def test_an_embedding_that_another_reads_too_is_an_error(how):
    check_refused(lora(2, **ON), Embeds(ELSEWHERE[how]), IDS, "wte")


@pytest.mark.slow
def test_a_head_that_attends_and_a_head_of_its_own_are_none():
    check_same(lora(2, **ON), Embeds(lambda model, wte, h: wte.attend(h)), IDS)
    check_same(lora(2, **ON), Embeds(lambda model, wte, h: nn.Dense(7)(h)), IDS)


def test_a_weight_whose_other_reading_changes_no_output_is_none():
    check_same(lora(2, **ON), Embeds(lambda model, wte, h: (wte.attend(h), h @ wte.embedding.T)[0]), IDS)


def test_what_is_left_out_may_be_read_anywhere():
    check_same(lora(2, target_modules=("up",)), Embeds(ELSEWHERE["attribute"]), IDS)


def test_part_of_a_model_is_checked_too():
    model, method = Parts(), lora(2, **ON)
    params = started(method, model, IDS)
    merged = model.apply({"params": method.merge(params)}, IDS, method="states")
    for name in ("states", Parts.states, model.states):
        np.testing.assert_allclose(bind(method, model)({"params": params}, IDS, method=name), merged, atol=1e-4)
    apply = bind(method, model)
    apply({"params": params}, IDS, method="states")
    for name in ("__call__", Parts.__call__, lambda module, ids: module(ids)):
        with pytest.raises(PeftJaxError, match=SAID.format("wte")):
            apply({"params": params}, IDS, method=name)
    with pytest.raises(PeftJaxError, match=SAID.format("wte")):
        check_read(method, lambda p: bind(method, model)({"params": p}, IDS), params)


class Standardised(nn.Dense):
    """A Dense that computes with its kernel, standardised (arXiv 1903.10520)."""

    @nn.compact
    def __call__(self, x):
        """(..., in) -> (..., features)."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return x @ ((kernel - kernel.mean(0)) / kernel.std(0)) + self.param("bias", self.bias_init, (self.features,))


class Scaled(nn.Dense):
    """A Dense whose output is scaled."""

    @nn.compact
    def __call__(self, x):
        """(..., in) -> (..., features)."""
        return 10 * super().__call__(x)


class Net(nn.Module):
    """One module that ``make`` gives."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make(name="up")(x)


class Block(nn.Module):
    """``tied``: a second product with the same kernel."""

    tied: bool

    @nn.compact
    def __call__(self, x, _):
        up = nn.Dense(16, name="up")
        y = up(x)
        return (y + x @ up.variables["params"]["kernel"] if self.tied else y), None


class Deep(nn.Module):
    """Blocks in a scan, each behind remat."""

    tied: bool

    @nn.compact
    def __call__(self, x):
        body = nn.scan(nn.remat(Block, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True},
                       length=2)  # fmt: skip
        return body(self.tied, name="layers")(x, None)[0]


X = jax.random.normal(jax.random.key(3), (3, 16))
UP = ("up",)
METHODS = {
    "adalora": adalora(2, 3, total_step=10, target_modules=UP), "dora": dora(2, target_modules=UP),
    "hra": hra(2, target_modules=UP), "ia3": ia3(UP, ()), "ia3_in": ia3(UP, UP), "loha": loha(2, target_modules=UP),
    "lokr": lokr(2, target_modules=UP), "lora": lora(2, target_modules=UP), "miss": miss(r=4, target_modules=UP),
    "oft": oft(oft_block_size=4, target_modules=UP), "vera": vera(4, UP),
    "pissa": lora(2, target_modules=UP, init_lora_weights="pissa")}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_beside_a_kernel_refuses_a_kernel_that_is_standardised_first(name):
    check_refused(METHODS[name], Net(partial(Standardised, 16)), X, "up", said=NEVER)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_beside_a_kernel_acts_inside_of_a_subclass_once(name):
    check_same(METHODS[name], Net(partial(Scaled, 16)), X)


def test_a_subclass_behind_remat():
    check_refused(METHODS["lora"], Net(lambda name: nn.remat(Standardised)(16, name=name)), X, "up", said=NEVER)


@pytest.mark.slow
def test_inside_of_scan_and_remat():
    check_refused(METHODS["lora"], Deep(True), X, "layers/up")
    check_same(METHODS["lora"], Deep(False), X)


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda name: nn.DenseGeneral((4, 5), name=name), lambda name: nn.remat(nn.Dense)(16, name=name),
    lambda name: nn.remat(Scaled)(16, name=name), lambda name: nn.jit(nn.Dense)(16, name=name),
    lambda name: nn.Dense(16, dtype=jnp.float32, param_dtype=jnp.float16, name=name),
    lambda name: nn.MultiHeadDotProductAttention(2, name=name)])
def test_modules_of_flax_are_none(make):
    inputs = X[None] if "Attention" in type(make("up")).__name__ else X
    method = lora(2, target_modules=("query", "key", "value", "out") if inputs.ndim == 3 else UP)
    params = started(method, model := Net(make), inputs)
    ours = bind(method, model)({"params": params}, inputs)
    near = 5e-3 if jnp.float16 in (leaf.dtype for leaf in jax.tree.leaves(params)) else 1e-4
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, inputs), ours, atol=near * ours.max())


def test_a_quantised_kernel_and_a_method_that_cannot_be_merged_beside_it():
    model = Embeds(lambda model, wte, h: h @ model.variables["params"]["up"]["kernel"])
    params = model.init(jax.random.key(0), IDS)["params"]
    method = chain(METHODS["lora"], bitfit()._replace(fold=None))
    check_refused(method, model, IDS, "up", moved(method, method.init(jax.random.key(1), params)))
    method = chain(quantize(block_size=16, target_modules=UP), METHODS["lora"])
    check_same(method, Net(partial(nn.Dense, 16)), X)


def test_mixed_adapters_are_checked_too():
    model, method = Net(partial(Standardised, 16)), METHODS["lora"]
    params = model.init(jax.random.key(0), X)["params"]
    mixed, both = mix_adapters({"one": (method, moved(method, method.init(jax.random.key(1), params)))}, params)
    check_refused(mixed, model, X, "up", both)


@pytest.mark.slow
def test_methods_that_train_parts_of_a_leaf():
    """Copies of some layers, and some rows: where the leaf itself is read, it is still the base's."""
    tokens = trainable_tokens([1, 2])
    check_refused(tokens, Embeds(ELSEWHERE["attribute"]), IDS, "wte")
    check_same(tokens, Embeds(lambda model, wte, h: wte.attend(h)), IDS)


@pytest.mark.slow
def test_a_leaf_that_trains_in_place_may_be_read_anywhere():
    check_same(full(".*embedding"), Embeds(ELSEWHERE["attribute"]), IDS)
    check_same(full(".*kernel"), Net(partial(Standardised, 16)), X)
    check_same(lora(2, target_modules=UP, modules_to_save=("wte",)), Embeds(ELSEWHERE["attribute"]), IDS)
