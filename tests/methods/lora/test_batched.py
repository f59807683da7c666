"""Many adapters on one base: rows that differ, switches without recompilation, the base never lost."""

import dataclasses

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
    make_mesh,
    mix_adapters,
    partition,
    place,
    shardings,
    untie,
    use_adapters,
)
from peft_jax.parallel import partitioning
from peft_jax.parallel.mesh import feed
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


@pytest.mark.slow
def test_rows_of_one_batch_equal_each_adapter_alone(tiny_model, adapters, mixed):
    method, params, apply = mixed
    for names in (["small", None, "wide"], ["one layer", "small", "one layer"]):
        together = np.asarray(apply({"params": use_adapters(method, params, names)}, IDS))
        for row, name in enumerate(names):
            expected = alone(tiny_model, adapters, name, IDS[row:row + 1])[0]
            np.testing.assert_allclose(together[row], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(together[0] - alone(tiny_model, adapters, None, IDS[:1])[0]).max() > 0.1


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_mixed_adapters_lie_on_a_mesh_beside_their_kernels(tiny_model, adapters, mixed):
    """Mixed there or before, however small a leaf must be to stay whole, rows of other adapters on each device."""
    model, base = tiny_model
    method, params, _ = mixed
    mesh, names = make_mesh(2, 2, 2), ["small", None, "wide", "one layer"]
    ids = np.concatenate([IDS, IDS[:1]])
    expected = [alone(tiny_model, adapters, name, ids[row:row + 1])[0] for row, name in enumerate(names)]
    there = {name: (own, place(own, model, tuned, mesh)) for name, (own, tuned) in adapters.items()}
    lying = partitioning.put(params, shardings(method, model, params, mesh, large=1))
    assert "fsdp" in str(lying["layers"]["mlp"]["down_proj"]["mixed_b"].sharding.spec)
    assert "tensor" in str(lying["layers"]["mlp"]["down_proj"]["mixed_a"].sharding.spec)
    for tree in (lying, place(method, model, mix_adapters(there, place(None, model, base, mesh))[1], mesh)):
        ours = jax.jit(bind(method, model, mesh))({"params": use_adapters(method, tree, names)},
                                                  feed(mesh, {"ids": ids})["ids"])
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


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


def of_another_model(changes, tiny_model):
    """A LoRA on q_proj, and the params of a model that differs from the tiny one in ``changes``."""
    config = dataclasses.replace(tiny_model[0].config, **changes)
    params = tiny_model[0].clone(config=config).init(jax.random.key(0), IDS)["params"]
    method = lora(r=2, target_modules=("q_proj",))
    return method, method.init(jax.random.key(0), params)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "sizes"), [
    ({"hidden_size": 24}, r"\(2, 24, 32\), in base_params it is \(2, 32, 32\)"),
    ({"num_hidden_layers": 3}, r"\(3, 32, 32\), in base_params it is \(2, 32, 32\)"),
])  # fmt: skip
def test_an_adapter_of_another_model_is_an_error(tiny_model, adapters, changes, sizes):
    given = {**adapters, "odd": of_another_model(changes, tiny_model)}
    with pytest.raises(PeftJaxError, match=f"adapter 'odd' changes 'layers/self_attn/q_proj/kernel' of {sizes}"):
        mix_adapters(given, tiny_model[1])


def test_an_adapter_of_a_head_wants_a_base_with_a_head(tiny_model):
    _, base = tiny_model
    method, whole = lora(r=2, target_modules=("q_proj", "lm_head")), untie(base)
    params = method.init(jax.random.key(0), whole)
    with pytest.raises(PeftJaxError, match=r"adapter 'head' changes 'lm_head/kernel', which base_params lack.*untie"):
        mix_adapters({"head": (method, params)}, base)


@pytest.mark.slow
def test_heads_are_mixed_too(tiny_model):
    """A kernel that stands alone, in no stack."""
    model, whole = tiny_model[0], untie(tiny_model[1])
    method = lora(r=2, target_modules=("lm_head",))
    params = properties.moved(method, method.init(jax.random.key(0), whole), seed=0)
    mixed, both = mix_adapters({"head": (method, params)}, whole)
    expected = bind(method, model)({"params": params}, IDS)
    for names in ("head", ["head", None, "head"]):
        found = bind(mixed, model)({"params": use_adapters(mixed, both, names)}, IDS)
        np.testing.assert_allclose(found[::2], expected[::2], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[1], model.apply({"params": whole}, IDS)[1])


@pytest.mark.parametrize("names", [0, [0, 1], [], [["small"]], (1.5,)])
def test_names_of_the_wrong_type_are_errors(mixed, names):
    with pytest.raises(PeftJaxError, match=r"use_adapters: names=.*: small, wide, one layer"):
        use_adapters(*mixed[:2], names)


def test_adapters_of_the_wrong_type_are_errors(tiny_model, adapters, mixed):
    pair = adapters["small"]
    for given in ([pair], {1: pair}):
        with pytest.raises(PeftJaxError, match="was given no dict by name"):
            mix_adapters(given, tiny_model[1])
    for odd in (pair[0], (pair[1], pair[0]), pair[1], None):
        with pytest.raises(PeftJaxError, match=r"adapter 'odd' is no \(method, params\)"):
            mix_adapters({"odd": odd}, tiny_model[1])
    with pytest.raises(PeftJaxError, match="the params have no 'mixed_rows'"):
        use_adapters(mixed[0], None, "small")


@pytest.mark.slow
def test_params_without_the_leaves_are_an_error(tiny_model, adapters, mixed):
    base, (method, params) = tiny_model[1], adapters["small"]
    with pytest.raises(PeftJaxError, match="adapter 'plain' has params without 'lora_a' leaves"):
        mix_adapters({"plain": (method, base)}, base)
    with pytest.raises(PeftJaxError, match="adapter 'part' has params without 'layers/self_attn/q_proj/lora_scaling'"):
        mix_adapters({"part": (method, partition(params, method.labels(params))[0])}, base)
    with pytest.raises(PeftJaxError, match="the params have no 'mixed_rows': give those that mix_adapters"):
        use_adapters(mixed[0], base, "small")
