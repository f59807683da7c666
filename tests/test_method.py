from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import Method, PeftJaxError, bind, chain, check_read, flatten, ia3, lora
from peft_jax.core.tree import map_paths


class Net(nn.Module):
    """Two Dense layers; ``second`` is called only when asked for, ``third`` never reaches the output."""

    @nn.compact
    def __call__(self, x, second=True):
        x = nn.Dense(4, name="first")(x)
        nn.Dense(3, name="third")(x)
        return nn.Dense(3, name="second")(x) if second else x

    def double(self, x):
        return 2 * x


X = jnp.arange(8.0).reshape(2, 4)
MODEL = Net()
PARAMS = MODEL.init(jax.random.key(0), X)["params"]


def on(*modules, **options):
    return lora(r=2, target_modules=modules, init_lora_weights=False, **options)


def scaled(name, factor, group):
    """A toy method: the output of module ``name`` times a leaf, which starts at ``factor``."""

    def init(rng, params, axes=None):
        return {**params, name: {**params[name], f"factor_{group}": jnp.float32(factor)}}

    def intercept(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable("params", f"factor_{group}"):
            return y * module.get_variable("params", f"factor_{group}")
        return y

    def labels(params):
        return map_paths(lambda path, _: group if path.endswith(f"factor_{group}") else "frozen", params)

    def merge(params):
        own = dict(params[name])
        factor = own.pop(f"factor_{group}")
        return {**params, name: jax.tree.map(lambda leaf: leaf * factor, own)}

    return Method(init, intercept, labels, merge, {"peft_type": "SCALED"})


@pytest.mark.slow
def test_chain_applies_labels_and_merges_every_method():
    method = chain(scaled("second", 3.0, "slow"), on("first"))
    params = method.init(jax.random.key(1), PARAMS)
    lora_alone = {**params, "second": PARAMS["second"]}
    expected = 3 * bind(on("first"), MODEL)({"params": lora_alone}, X)
    np.testing.assert_allclose(bind(method, MODEL)({"params": params}, X), expected, rtol=1e-5)
    np.testing.assert_allclose(MODEL.apply({"params": method.merge(params)}, X), expected, rtol=1e-4)
    labels = flatten(method.labels(params))
    assert {path: label for path, label in labels.items() if label != "frozen"} == {
        "first/lora_a": "trainable", "first/lora_b": "trainable", "second/factor_slow": "slow"}
    assert [part["peft_type"] for part in method.config["methods"]] == ["SCALED", "LORA"]


@pytest.mark.parametrize("first", ["ia3", "lora"])
def test_two_methods_of_one_kernel_merge_in_the_order_of_the_forward_pass(first):
    methods = [ia3(("first",), (), init_ia3_weights=False), on("first")]
    method = chain(*methods if first == "ia3" else reversed(methods))
    params = method.init(jax.random.key(1), PARAMS)
    np.testing.assert_allclose(MODEL.apply({"params": method.merge(params)}, X),
                               bind(method, MODEL)({"params": params}, X), rtol=1e-4, atol=1e-5)


def test_a_chain_with_a_part_that_cannot_be_folded_says_so():
    method = chain(on("first"), scaled("second", 1.0, "a")._replace(fold=None))
    assert on("first").mergeable and not method.mergeable
    with pytest.raises(PeftJaxError, match=r"merge: SCALED cannot be folded into the weights: save the adapter"):
        method.merge(method.init(jax.random.key(0), PARAMS))


def test_two_groups_for_one_leaf_are_an_error():
    first, second = on("first"), scaled("second", 1.0, "a")
    quarrel = second._replace(labels=lambda params: jax.tree.map(lambda _: "a", params))
    params = chain(first, second).init(jax.random.key(0), PARAMS)
    with pytest.raises(PeftJaxError, match="first/lora_a"):
        chain(first, quarrel).labels(params)


def test_two_loras_on_one_tree_are_an_error():
    """Each would read the other's leaves too, and add every branch twice."""
    with pytest.raises(PeftJaxError, match="already hold LORA"):
        chain(on("first"), on("second")).init(jax.random.key(0), PARAMS)


def test_chain_of_nothing_is_an_error():
    with pytest.raises(PeftJaxError, match="no method"):
        chain()


def test_init_works_on_shapes_alone():
    method = on("first")
    shapes = jax.eval_shape(lambda p: method.init(jax.random.key(0), p), PARAMS)
    params = method.init(jax.random.key(0), PARAMS)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), params)


def test_bind_has_the_signature_of_apply():
    method = on("second")
    apply, params = bind(method, MODEL), method.init(jax.random.key(0), PARAMS)
    plain = MODEL.apply({"params": PARAMS}, X)
    assert not np.allclose(apply({"params": params}, X), plain)
    np.testing.assert_array_equal(apply({"params": params}, X, method="double"), 2 * X)
    out, state = apply({"params": params}, X, mutable=["intermediates"], capture_intermediates=True)
    assert out.shape == plain.shape and "first" in state["intermediates"]
    np.testing.assert_array_equal(MODEL.apply({"params": PARAMS}, X), plain)  # the interceptor is gone again


@pytest.mark.parametrize("jitted", [False, True])
def test_a_leaf_the_pass_never_reads_is_an_error(jitted):
    method = on("first", "second", "third")
    apply, params = bind(method, MODEL), method.init(jax.random.key(0), PARAMS)
    for _ in range(2):  # a call that failed counts as no check
        with pytest.raises(PeftJaxError, match=r"never reads 2 trainable leaves, the first is 'third/lora_a'"):
            (jax.jit(apply) if jitted else apply)({"params": params}, X)
    apply = bind(method, MODEL)
    with pytest.raises(PeftJaxError, match=r"never reads 4 trainable leaves, the first is 'third/lora_a'"):
        apply({"params": params}, X, second=False)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("mutable", [True, "params", ["params", "intermediates"]])
def test_a_leaf_that_comes_back_with_mutable_parameters_is_not_read_by_that(mutable, jitted):
    method = on("first", "third")
    params = method.init(jax.random.key(0), PARAMS)
    apply = partial(bind(method, MODEL), mutable=mutable)
    with pytest.raises(PeftJaxError, match=r"never reads 2 trainable leaves, the first is 'third/lora_a'"):
        (jax.jit(apply) if jitted else apply)({"params": params}, X)


@pytest.mark.parametrize("name", ["__call__", "double", Net.__call__])
def test_parameters_without_the_methods_leaves_are_an_error_in_every_method_of_the_model(name):
    """Else the base model would answer, and nothing would say so."""
    method = on("first")
    apply = bind(method, MODEL)
    apply({"params": method.init(jax.random.key(0), PARAMS)}, X, method=name)
    for _ in range(2):
        with pytest.raises(PeftJaxError, match="hold none of LORA's leaves"):
            apply({"params": PARAMS}, X, method=name)


def test_under_jit_the_first_call_traces_the_model_once_and_is_like_the_next():
    """The check reads the program that gives the result."""
    calls = []

    class Counted(Net):
        def __call__(self, x):
            calls.append(x)
            return super().__call__(x)

    method = on("first", "second")
    apply, params = bind(method, Counted()), method.init(jax.random.key(0), PARAMS)
    first = jax.jit(apply)({"params": params}, X)
    assert len(calls) == 1
    np.testing.assert_allclose(first, apply({"params": params}, X), rtol=1e-6)


def test_the_first_call_gives_mutated_variables_and_gradients():
    method = on("first", "second")
    params = method.init(jax.random.key(0), PARAMS)

    def total(params, apply):
        out, state = apply({"params": params}, X, mutable=["intermediates"], capture_intermediates=True)
        return (out**2).sum(), state

    apply = bind(method, MODEL)
    first, second = (jax.jit(jax.value_and_grad(partial(total, apply=apply), has_aux=True))(params) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


def test_check_read_passes_when_all_are_read():
    method = on("first", "second")
    params = method.init(jax.random.key(0), PARAMS)
    check_read(method, lambda p: bind(method, MODEL)({"params": p}, X), params)


class Twice(nn.Module):
    """Two products with one Dense; ``half`` is a part, behind jit where ``half_jitted`` is called.

    A jit inside remembers what it traced of a model, by its fields.
    """

    number: int = 0

    def setup(self):
        self.first = nn.Dense(4)

    def __call__(self, x):
        return self.first(self.half(x))

    def half(self, x):
        """(..., 4) -> (..., 4)."""
        return self.first(x)

    @nn.jit
    def half_jitted(self, x):
        """As ``half``."""
        return self.first(x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half", "half_jitted"])
def test_a_method_of_the_model_is_called_by_its_name_or_as_a_function(name):
    model, method = Twice(), on("first")
    params = method.init(jax.random.key(1), model.init(jax.random.key(0), X)["params"])
    expected = bind(method, model)({"params": params}, X, method=name)
    np.testing.assert_allclose(model.apply({"params": method.merge(params)}, X, method=name), expected, rtol=1e-4)
    spelled = (name, getattr(Twice, name), getattr(model, name), partial(getattr(Twice, name)),
               lambda module, x: getattr(module, name)(x))
    for one in spelled:
        apply = partial(bind(method, model), method=one)
        for call in (apply, jax.jit(apply)):
            np.testing.assert_allclose(call({"params": params}, X), expected, rtol=1e-4, err_msg=str(one))


@pytest.mark.parametrize(("number", "name"), [(1, "half_jitted"), (2, Twice.half_jitted)])
def test_a_jit_inside_that_remembers_the_base_is_an_error(number, name):
    """It would give the base's output, as it was traced without the method."""
    model, method = Twice(number), on("first")
    params = method.init(jax.random.key(2), model.init(jax.random.key(0), X)["params"])
    model.apply({"params": params}, X, method=name)
    with pytest.raises(PeftJaxError, match=r"an nn\.jit inside remembers a call without the method"):
        bind(method, model)({"params": params}, X, method=name)
