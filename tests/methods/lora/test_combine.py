"""Combined adapters against real peft's add_weighted_adapter."""

import jax
import numpy as np
import pytest

from peft_jax import PeftJaxError, flatten, ia3, lora, save_adapter, untie, weighted_adapter
from peft_jax.methods.lora.combine import KINDS
from tests import peer, properties

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

METHODS = {
    "one": lora(r=3, lora_alpha=8),
    "other": lora(r=3, lora_alpha=5, target_modules=("q_proj", "up_proj")),
    "wide": lora(r=5, lora_alpha=4, target_modules=("v_proj", "up_proj")),
}
EQUAL = ("linear", "ties", "magnitude_prune")  # of equal ranks; DARE draws
UNEQUAL = ("cat", "svd", "ties_svd", "magnitude_prune_svd")


@pytest.fixture(scope="module")
def adapters(peer_bases):
    base = peer_bases["llama"][2]
    return {name: (method, properties.moved(method, method.init(jax.random.key(i), base), seed=i, by=0.5))
            for i, (name, method) in enumerate(METHODS.items())}


@pytest.fixture(scope="module")
def theirs(peer_bases, adapters, tmp_path_factory):
    """The peft model that holds the same adapters."""
    fresh, model, _ = peer_bases["llama"]
    folder = tmp_path_factory.mktemp("adapters")
    for name, (method, params) in adapters.items():
        save_adapter(folder / name, method, model, params)
    loaded = peft.PeftModel.from_pretrained(fresh(), folder / "one", adapter_name="one")
    for name in ("other", "wide"):
        loaded.load_adapter(folder / name, adapter_name=name)
    return loaded


def both(peer_bases, adapters, theirs, names, weights, kind, **options):
    """(our logits of the combined adapter, merged; peft's)."""
    _, model, base = peer_bases["llama"]
    method, params = weighted_adapter([adapters[name] for name in names], weights, base, kind, **options)
    label = f"{kind}-{'-'.join(names)}-{weights}-{options}".replace(".", "_")
    theirs.add_weighted_adapter(list(names), weights, label, combination_type=kind, **options)
    theirs.set_adapter(label)
    return peer.forward(model, method.merge(params)), peer.torch_logits(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [[0.7, 0.6], [1.5, -0.5]])
@pytest.mark.parametrize("kind", [*EQUAL, *UNEQUAL])
def test_combined_equals_peft(peer_bases, adapters, theirs, kind, weights):
    names = ("one", "other") if kind in EQUAL else ("one", "wide")
    options = {} if kind in ("linear", "cat", "svd") else {"density": 0.6}
    ours, expected = both(peer_bases, adapters, theirs, names, weights, kind, **options)
    peer.assert_close(ours, expected)
    assert np.abs(ours - peer.forward(*peer_bases["llama"][1:])).max() > 0.05 * np.abs(ours).max()


@pytest.mark.slow
def test_majority_by_frequency_and_a_given_rank(peer_bases, adapters, theirs):
    options = {"density": 0.5, "majority_sign_method": "frequency"}
    names, weights = ("one", "other", "wide"), [0.5, 0.8, 0.4]
    peer.assert_close(*both(peer_bases, adapters, theirs, names, weights, "ties_svd", **options))
    peer.assert_close(*both(peer_bases, adapters, theirs, ("one", "wide"), [0.5, 0.8], "svd", svd_rank=2))


@pytest.mark.slow
def test_cat_is_the_exact_sum(peer_bases, adapters):
    """And neither the base nor the adapters change."""
    base = flatten(peer_bases["llama"][2])
    before = {name: {path: np.array(leaf) for path, leaf in flatten(params).items()}
              for name, (_, params) in adapters.items()}
    method, params = weighted_adapter([adapters["one"], adapters["wide"]], [0.5, -2], peer_bases["llama"][2], "cat")
    merged, one, wide = (flatten(m.merge(p)) for m, p in ((method, params), adapters["one"], adapters["wide"]))
    for path, leaf in merged.items():
        expected = base[path] + 0.5 * (one[path] - base[path]) - 2 * (wide[path] - base[path])
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)
    for name, (_, after) in adapters.items():
        for path, leaf in flatten(after).items():
            np.testing.assert_array_equal(leaf, before[name][path])


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare(peer_bases, adapters, kind):
    """With nothing dropped it is the plain kind; what is dropped depends on rng alone, a share of 1 - density."""
    base = peer_bases["llama"][2]
    given = [adapters["one"], adapters["other"]], [0.7, 0.6], base
    plain = {"dare_linear": "linear", "dare_ties": "ties", "dare_linear_svd": "svd", "dare_ties_svd": "ties_svd"}[kind]

    def merged(kind, density, seed=0):
        method, params = weighted_adapter(*given, kind, density=density, rng=np.random.default_rng(seed))
        return flatten(method.merge(params)), params

    whole, _ = merged(kind, 1.0)
    for path, leaf in merged(plain, 1.0)[0].items():
        np.testing.assert_allclose(leaf, whole[path], rtol=1e-5, atol=1e-6)
    (some, params), (same, _), (other, _) = (merged(kind, 0.5, seed) for seed in (0, 0, 1))
    path = "layers/self_attn/q_proj/kernel"
    assert np.array_equal(some[path], same[path]) and not np.array_equal(some[path], other[path])
    if kind == "dare_linear":  # v is the first adapter's alone: half of A is zero, the rest twice as large
        mine = flatten(params)["layers/self_attn/v_proj/lora_a"]
        own = flatten(adapters["one"][1])["layers/self_attn/v_proj/lora_a"] * np.sqrt(0.7 * 8 / 3)
        kept = mine != 0
        assert 0.35 < kept.mean() < 0.65
        np.testing.assert_allclose(mine[kept], 2 * own[kept], rtol=1e-5)


def test_the_combined_adapter_is_saved_as_any_other(peer_bases, adapters, tmp_path):
    fresh, model, base = peer_bases["llama"]
    method, params = weighted_adapter([adapters["one"], adapters["wide"]], [1, 1], base, "cat")
    save_adapter(tmp_path / "sum", method, model, params)
    opened = peft.PeftModel.from_pretrained(fresh(), tmp_path / "sum")
    peer.assert_close(peer.forward(model, method.merge(params)), peer.torch_logits(opened))


def test_what_cannot_be_combined_is_an_error(peer_bases, adapters):
    base = peer_bases["llama"][2]
    two = [adapters["one"], adapters["wide"]]
    for kind in ("linear", "ties"):
        with pytest.raises(PeftJaxError, match=r"needs adapters of one rank, these have \[3, 5\]: use"):
            weighted_adapter(two, [1, 1], base, kind, density=0.5)
    cases = [("tis", {}, r"did you mean ties"), ("ties_svd", {}, "needs density"), ("ties_svd", {"density": 2}, "is 2"),
             ("dare_linear_svd", {"density": 0.5}, "give rng="), ("svd", {"majority_sign_method": "most"}, "total")]
    for kind, options, why in cases:
        with pytest.raises(PeftJaxError, match=why):
            weighted_adapter(two, [1, 1], base, kind, **options)
    with pytest.raises(PeftJaxError, match="2 adapters and 1 weights"):
        weighted_adapter(two, [1], base)
    other = ia3()
    with pytest.raises(PeftJaxError, match="only plain LoRA can be mixed or combined"):
        weighted_adapter([(other, other.init(jax.random.key(0), base))], [1], base)
    assert set(KINDS) >= {*EQUAL, *UNEQUAL}


@pytest.mark.parametrize(("given", "weights", "kind", "why"), [
    (lambda one: {"a": one}, [1], "svd", "adapters is a dict: give a list"),
    (lambda one: [one, one], 1.0, "svd", "weights is a float: give a list"),
    (lambda one: [one[::-1]], [1], "svd", r"adapter 0 is no \(method, params\)"),
    (lambda one: [one[0]], [1], "svd", r"adapter 0 is no \(method, params\)"),
    (lambda one: [one], [1], None, "combination_type=None, .*give two words"),
])  # fmt: skip
def test_what_is_of_the_wrong_type_is_an_error(peer_bases, adapters, given, weights, kind, why):
    with pytest.raises(PeftJaxError, match=why):
        weighted_adapter(given(adapters["one"]), weights, peer_bases["llama"][2], kind)


@pytest.mark.parametrize("weights", [[1, np.nan], [1, np.inf], [1, 1e300], ["1", "1"], [1, None], [1, [1]]])
def test_weights_that_are_no_finite_numbers_are_errors(peer_bases, adapters, weights):
    with pytest.raises(PeftJaxError, match=r"the weights are .*: give a finite number for each"):
        weighted_adapter([adapters["one"], adapters["wide"]], weights, peer_bases["llama"][2])


@pytest.mark.parametrize(("options", "why"), [
    ({"svd_rank": 0}, "svd_rank=0: a rank is"), ({"svd_rank": -1}, "svd_rank=-1"), ({"svd_rank": 2.0}, "svd_rank=2.0"),
    ({"svd_rank": True}, "svd_rank=True"), ({"density": "half"}, "needs density.*it is half"),
    ({"density": np.nan}, "it is nan"), ({"rng": 3}, "give rng="), ({"rng": jax.random.key(0)}, "give rng="),
])  # fmt: skip
def test_options_of_another_kind_are_errors(peer_bases, adapters, options, why):
    given = [adapters["one"], adapters["wide"]], [1, 1], peer_bases["llama"][2], "dare_ties_svd"
    with pytest.raises(PeftJaxError, match=why):
        weighted_adapter(*given, **{"density": 0.5, "rng": np.random.default_rng(0), **options})


@pytest.mark.slow
def test_adapters_must_fit_the_base(peer_bases, adapters):
    """A deeper base, a tied one under an adapted head, and params that are not the adapter's."""
    base, (method, params) = peer_bases["llama"][2], adapters["one"]
    deeper = {**base, "layers": jax.tree.map(lambda leaf: np.concatenate([leaf, leaf[:1]]), base["layers"])}
    with pytest.raises(PeftJaxError, match=r"adapter 1 changes 'layers/self_attn/q_proj/kernel' of \(3, .*it is \(4, "):
        weighted_adapter([(method, method.init(jax.random.key(0), deeper)), (method, params)], [1, 1], deeper)
    with pytest.raises(PeftJaxError, match="adapter 0 has params without 'lora_a' leaves"):
        weighted_adapter([(method, base)], [1], base)
    head = lora(r=2, target_modules=("lm_head",))
    whole, tied = ((untie(base), base) if "lm_head" not in base else
                   (base, {name: part for name, part in base.items() if name != "lm_head"}))
    with pytest.raises(PeftJaxError, match="adapter 0 changes 'lm_head/kernel', which base_params lack"):
        weighted_adapter([(head, head.init(jax.random.key(0), whole))], [1], tied)
