"""Layouts of models that name, box or keep their variables in other ways."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze, meta

import peft_jax
from peft_jax import METHODS, PeftJaxError, bind, chain, flatten, kernel_axes, lora, partition, quantize
from peft_jax.core.kernel_axes import KernelAxes
from tests.properties import moved

X = jax.random.normal(jax.random.key(0), (2, 5, 16))


class Image(nn.Module):
    """Submodules called "embedding" and "kernel", as in every ViT of big_vision, and a norm with running averages."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3,), name="embedding")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(16, name="kernel")(x))
        return nn.Dense(16, name="head")(x)


def check_same(method, model, variables, x, axes):
    """Merged equals adapted, of a model with collections other than parameters."""
    params, others = variables["params"], {name: own for name, own in variables.items() if name != "params"}
    tuned = moved(method, method.init(jax.random.key(1), params, axes=axes))
    ours = bind(method, model)({"params": tuned, **others}, x)
    merged = model.apply({"params": method.merge(tuned), **others}, x)
    np.testing.assert_allclose(merged, ours, atol=1e-4 * np.abs(ours).max())
    assert not np.allclose(ours, model.apply(variables, x), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: lora(2, target_modules="all-linear"), lambda: lora(2, target_modules=("kernel",)),
    lambda: chain(quantize(block_size=16), lora(2, target_modules=("kernel",)))])
def test_submodules_called_as_weights_are_and_collections_beside_the_parameters(make):
    model = Image()
    variables = model.init(jax.random.key(0), X)
    stats = {"batch_stats": variables["batch_stats"]}
    axes = kernel_axes(model, variables["params"], X, variables=stats)
    assert axes == {"embedding/kernel": KernelAxes("Conv", (), (), (3, 16, 16)),
                    "kernel/kernel": KernelAxes("Dense", (), (16,), (16,)),
                    "head/kernel": KernelAxes("Dense", (), (16,), (16,))}
    again = kernel_axes(model, variables["params"], X, train=True, variables=stats, mutable=["batch_stats"])
    assert again == axes
    check_same(make(), model, variables, X, axes)


def test_a_collection_that_is_lacking_is_named():
    params = Image().init(jax.random.key(0), X)["params"]
    with pytest.raises(PeftJaxError, match=r'collection "batch_stats".*variables=\{'):
        kernel_axes(Image(), params, X)


class Boxed(nn.Module):
    """A Dense whose kernel says how it is to lie on a mesh."""

    @nn.compact
    def __call__(self, x):
        start = nn.with_partitioning(nn.initializers.lecun_normal(), ("a", "b"))
        return nn.Dense(16, kernel_init=start, name="q_proj")(x)


NEEDED = {"adalora": {"total_step": 10}, "compacter": {"reduction_factor": 2}, "lokr": {"r": 1}, "miss": {"r": 4},
          "trainable_tokens": {"token_indices": (1,)}}


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"prefix", "prompt", "ptuning"}))
def test_boxed_leaves_are_an_error_that_says_what_to_do(name):
    boxed = Boxed().init(jax.random.key(0), X)["params"]
    with pytest.raises(PeftJaxError, match=r"'q_proj/kernel' is of type Partitioned.*flax\.core\.meta\.unbox"):
        METHODS[name](**NEEDED.get(name, {})).init(jax.random.key(0), boxed)


def test_boxes_that_come_back_after_init_are_errors_too():
    method, boxed = lora(2, target_modules=("q_proj",)), Boxed().init(jax.random.key(0), X)["params"]
    plain = meta.unbox(boxed)
    assert kernel_axes(Boxed(), plain, X) == {"q_proj/kernel": KernelAxes("Dense", (), (16,), (16,))}
    mixed = {"q_proj": {**method.init(jax.random.key(0), plain)["q_proj"], "kernel": boxed["q_proj"]["kernel"]}}
    for call in (lambda: kernel_axes(Boxed(), boxed, X), lambda: method.merge(mixed),
                 lambda: bind(method, Boxed())({"params": mixed}, X)):
        with pytest.raises(PeftJaxError, match="is of type Partitioned"):
            call()
    check_same(method, Boxed(), {"params": plain}, X, None)


class Slashes(nn.Module):
    """Names with a slash: of a module, and of a parameter, as flax's own WeightNorm makes it."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="100%/out")(nn.WeightNorm(nn.Dense(8, name="q_proj"))(x))


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: lora(2, target_modules=("100%25%2Fout",)), lambda: peft_jax.full(), lambda: peft_jax.bitfit(),
    lambda: chain(peft_jax.full(".*scale"), lora(2, target_modules=("100%25%2Fout",)))])
def test_names_with_a_slash_stay_what_they_are(make, tmp_path):
    model, method = Slashes(), make()
    params = model.init(jax.random.key(0), X)["params"]
    assert flatten(params).keys() == {"WeightNorm_0/q_proj%2Fkernel%2Fscale", "q_proj/kernel", "q_proj/bias",
                                      "100%25%2Fout/kernel", "100%25%2Fout/bias"}
    axes = kernel_axes(model, params, X)
    assert axes.keys() == {"q_proj/kernel", "100%25%2Fout/kernel"}
    check_same(method, model, {"params": params}, X, axes)
    merged = method.merge(method.init(jax.random.key(0), params, axes=axes))
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_a_weight_that_is_normalised_around_its_module_is_an_error():
    """Of the product beside it the norm would know nothing, of the merged kernel it does."""
    model, method = Slashes(), lora(2, target_modules=("q_proj",))
    params = method.init(jax.random.key(0), model.init(jax.random.key(0), X)["params"])
    with pytest.raises(PeftJaxError, match="'q_proj/kernel' would be changed by a merge, and the model does more with"):
        bind(method, model)({"params": params}, X)


@pytest.mark.parametrize("params", [{0: {"kernel": X}}, {"a": {1: X}}, {("a", "b"): X}])
def test_keys_that_are_no_strings_are_errors(params):
    method, labels = lora(2), jax.tree.map(lambda _: "frozen", params)
    for call in (lambda: flatten(params), lambda: method.init(jax.random.key(0), params), lambda: method.labels(params),
                 lambda: kernel_axes(Boxed(), params, X), lambda: bind(method, Boxed())({"params": params}, X),
                 lambda: partition(params, labels), lambda: method.merge(params)):
        with pytest.raises(PeftJaxError, match=r"a tree has the key .*: keys are strings"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: lora(2, target_modules=("head",)), lambda: peft_jax.full(), lambda: peft_jax.ia3(("head",), ()),
    lambda: chain(quantize(block_size=16, target_modules=("kernel",)), lora(2, target_modules=("head",)))])
def test_frozen_dicts_are_trees_and_labels(make):
    model, method = Image(), make()
    variables = model.init(jax.random.key(0), X)
    frozen = freeze(method.init(jax.random.key(1), freeze(variables["params"]), axes=kernel_axes(
        model, freeze(variables["params"]), X, variables=freeze({"batch_stats": variables["batch_stats"]}))))
    labels = method.labels(frozen)
    for tree in (labels, freeze(labels), method):
        trainable, rest = partition(frozen, tree)
        assert flatten(trainable).keys() | flatten(rest).keys() == flatten(frozen).keys() and trainable and rest
    ours = bind(method, model)({"params": frozen, "batch_stats": variables["batch_stats"]}, X)
    merged = model.apply({"params": method.merge(frozen), "batch_stats": variables["batch_stats"]}, X)
    np.testing.assert_allclose(merged, ours, atol=1e-4 * np.abs(ours).max())
