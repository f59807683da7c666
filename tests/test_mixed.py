"""Many adapters on one base: rows that differ, switches without recompilation, the base never lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax import (
    PeftJaxError,
    bind,
    combine,
    flatten,
    generate,
    ia3,
    lora,
    mix_adapters,
    partition,
    use_adapters,
)
from tests import properties

IDS = np.arange(36).reshape(3, 12) * 7 % 300
# Ranks, targets, scales and layers that differ.
METHODS = {
    "small": lora(r=2, lora_alpha=8),
    "wide": lora(r=5, target_modules=("q_proj", "down_proj"), rank_pattern={"layers.1.mlp.down_proj": 3}),
    "one layer": lora(r=3, use_rslora=True, target_modules=("v_proj", "up_proj"), layers_to_transform=1),
}


@pytest.fixture(scope="module")
def adapters(tiny_model):
    return {name: (method, properties.moved(method, method.init(jax.random.key(i), tiny_model[1]), seed=i))
            for i, (name, method) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def mixed(tiny_model, adapters):
    """(method, params, jitted bound apply)."""
    method, params = mix_adapters(adapters, tiny_model[1])
    return method, params, jax.jit(bind(method, tiny_model[0]))


def alone(tiny_model, adapters, name, ids):
    model, base = tiny_model
    method, params = adapters[name] if name else (None, base)
    return np.asarray((bind(method, model) if name else model.apply)({"params": params}, ids))


def test_rows_of_one_batch_equal_each_adapter_alone(tiny_model, adapters, mixed):
    method, params, apply = mixed
    for names in (["small", None, "wide"], ["one layer", "small", "one layer"]):
        together = np.asarray(apply({"params": use_adapters(method, params, names)}, IDS))
        for row, name in enumerate(names):
            expected = alone(tiny_model, adapters, name, IDS[row:row + 1])[0]
            np.testing.assert_allclose(together[row], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - alone(tiny_model, adapters, None, IDS[:1])[0]).max() > 0.1


def test_a_switch_never_recompiles(tiny_model, adapters, mixed):
    """Counted by the jit cache; the base itself is bit for bit the base model's."""
    method, params, _ = mixed
    traces, bound = [], bind(method, tiny_model[0])

    @jax.jit
    def apply(params, ids):
        traces.append(1)
        return bound({"params": params}, ids)

    for name in (*METHODS, None):
        found = apply(use_adapters(method, params, name), IDS)
        np.testing.assert_allclose(found, alone(tiny_model, adapters, name, IDS), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found, jax.jit(tiny_model[0].apply)({"params": tiny_model[1]}, IDS))
    assert len(traces) == 1
    for names in (["small", None, "wide"], [None, None, "small"]):
        apply(use_adapters(method, params, names), IDS)
    assert len(traces) == 2  # once more for rows; which adapters they use changes nothing


def test_adapters_of_one_shape_switch_by_combine_without_recompiling(tiny_model):
    """Any method's: the adapter's leaves are arguments like all others."""
    model, base = tiny_model
    method, traces = ia3(), []
    params = method.init(jax.random.key(0), base)
    bound = bind(method, model)

    @jax.jit
    def apply(params):
        traces.append(1)
        return bound({"params": params}, IDS)

    trained = [partition(properties.moved(method, params, seed), method.labels(params))[0] for seed in (1, 2)]
    one, two = (apply(combine(params, adapter)) for adapter in trained)
    assert len(traces) == 1 and np.abs(one - two).max() > 0.01


def test_rows_decode_as_each_adapter_alone(tiny_model, adapters, mixed):
    model, base = tiny_model
    method, params, _ = mixed
    names = ["wide", None, "small"]
    options = {"max_new_tokens": 5, "stop_ids": (0,)}
    mask = np.ones_like(IDS)
    together = generate(bind(method, model), model, use_adapters(method, params, names), IDS, mask, **options)
    for row, name in enumerate(names):
        own, tuned = adapters[name] if name else (None, base)
        apply = bind(own, model) if name else model.apply
        np.testing.assert_array_equal(together[row:row + 1],
                                      generate(apply, model, tuned, IDS[row:row + 1], mask[:1], **options))


def test_merging_never_loses_the_base(tiny_model, adapters):
    """Unmerging is keeping the base: merge gives a new tree, and the leaves of the old one stay bit for bit."""
    before = {path: np.array(leaf) for path, leaf in flatten(tiny_model[1]).items()}
    for method, params in adapters.values():
        merged = flatten(method.merge(params))
        assert any(not np.array_equal(merged[path], before[path]) for path in before)
        for path, leaf in flatten(tiny_model[1]).items():
            np.testing.assert_array_equal(leaf, before[path])
            np.testing.assert_array_equal(flatten(params)[path], before[path])


def test_mixed_rows_in_bfloat16(tiny_model, adapters, mixed):
    method, params, _ = mixed
    model = tiny_model[0].clone(dtype=jnp.bfloat16)
    chosen = use_adapters(method, params, ["small", None, "wide"])
    found = bind(method, model)({"params": chosen}, IDS)
    exact = np.asarray(mixed[2]({"params": chosen}, IDS))
    assert found.dtype == jnp.bfloat16 and np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


def test_what_cannot_be_mixed_is_an_error(tiny_model, adapters, mixed):
    model, base = tiny_model
    method, params, _ = mixed
    with pytest.raises(PeftJaxError, match=r"there is no adapter 'smal': did you mean small\?"):
        use_adapters(method, params, ["smal", None])
    with pytest.raises(PeftJaxError, match="named 2 rows, the batch has 3"):
        bind(method, model)({"params": use_adapters(method, params, ["small", None])}, IDS)
    with pytest.raises(PeftJaxError, match="was not made by mix_adapters"):
        use_adapters(METHODS["small"], params, "small")
    with pytest.raises(PeftJaxError, match="given no adapter"):
        mix_adapters({}, base)
    with pytest.raises(PeftJaxError, match="already hold mixed"):
        mix_adapters(adapters, params)
    for other, why in ((ia3(), "trains"), (lora(modules_to_save=("norm",)), "trains 'layers/input_layernorm/scale'")):
        with pytest.raises(PeftJaxError, match=why):
            mix_adapters({"odd": (other, other.init(jax.random.key(0), base))}, base)
