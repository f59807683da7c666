"""Chains: whose leaf is whose, who must come first, and that merging is the forward pass for every pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import (  # fmt: skip
    Method,
    PeftJaxError,
    adalora,
    bind,
    bitfit,
    bottleneck,
    chain,
    dora,
    flatten,
    full,
    houlsby,
    hra,
    ia3,
    ln_tuning,
    load_adapter,
    loha,
    lokr,
    lora,
    oft,
    parallel_adapter,
    prefix,
    prompt,
    ptuning,
    quantize,
    save_adapter,
    trainable_tokens,
    vera,
)
from peft_jax.core.kernel_axes import KernelAxes
from tests.peer import IDS, check_same_bits, forward
from tests.properties import check_training, moved

Q = ("q_proj",)


class Net(nn.Module):
    """One Dense module with a bias."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="q_proj", bias_init=nn.initializers.normal())(x)


X = jax.random.normal(jax.random.key(2), (3, 12))
NET = Net()
BASE = NET.init(jax.random.key(0), X)["params"]
ON_Q = {
    "adalora": lambda: adalora(2, 3, target_modules=Q), "bitfit": lambda: bitfit(Q),
    "dora": lambda: dora(2, target_modules=Q), "full": lambda: full(".*/kernel"),
    "hra": lambda: hra(2, target_modules=Q), "ia3_in": lambda: ia3(Q, Q), "ia3_out": lambda: ia3(Q, ()),
    "loha": lambda: loha(2, target_modules=Q), "lokr": lambda: lokr(2, target_modules=Q),
    "lora": lambda: lora(2, target_modules=Q), "oft": lambda: oft(oft_block_size=4, target_modules=Q),
    "olora": lambda: lora(2, target_modules=Q, init_lora_weights="olora"),
    "pissa": lambda: lora(2, target_modules=Q, init_lora_weights="pissa"), "vera": lambda: vera(4, Q),
}  # fmt: skip


REFUSALS = ("must come first", "already hold", "would train", "split")


@pytest.fixture(scope="module")
def tied(peer_bases):
    """(model, params) of the tiny Llama whose head is its embedding."""
    return peer_bases["tied"][1:]


def started(method, params):
    return method.init(jax.random.key(1), params)


@pytest.mark.slow
@pytest.mark.parametrize("first", ON_Q)
def test_merging_a_pair_is_its_forward_pass_or_the_pair_is_refused(first):
    compared = 0
    for second in ON_Q.keys() - {first}:
        method = chain(ON_Q[first](), ON_Q[second]())
        try:
            tuned = moved(method, started(method, BASE))
        except PeftJaxError as error:
            assert any(said in str(error) for said in REFUSALS), error
            continue
        ours = bind(method, NET)({"params": tuned}, X)
        merged = NET.apply({"params": method.merge(tuned)}, X)
        np.testing.assert_allclose(merged, ours, atol=1e-4 * np.abs(ours).max(), err_msg=f"{first}, {second}")
        compared += 1
    assert compared >= (3 if first == "full" else 5), compared


@pytest.mark.parametrize(("other", "first"), [
    ("ia3_out", "dora"), ("oft", "dora"), ("vera", "dora"), ("ia3_out", "pissa"), ("hra", "olora")])  # fmt: skip
def test_what_starts_from_the_kernel_must_come_first(other, first, tmp_path):
    other = ON_Q[other]()
    with pytest.raises(PeftJaxError, match="must come first in the chain: 'q_proj' already holds"):
        started(chain(other, ON_Q[first]()), BASE)
    method = chain(ON_Q[first](), other)
    tuned = moved(method, started(method, BASE))
    save_adapter(tmp_path, method, NET, tuned)
    again, loaded = load_adapter(tmp_path, BASE)
    ours = bind(method, NET)({"params": tuned}, X)
    np.testing.assert_allclose(bind(again, NET)({"params": loaded}, X), ours, atol=1e-4 * np.abs(ours).max())


@pytest.mark.parametrize("order", [1, -1])
def test_a_kernel_that_was_split_cannot_train_as_a_whole(order):
    with pytest.raises(PeftJaxError, match="'q_proj/kernel' trains as a whole"):
        started(chain(*[full(".*/kernel"), ON_Q["pissa"]()][::order]), BASE)


@pytest.mark.slow
def test_tokens_of_an_embedding_that_a_lora_changes_must_come_first(tied):
    model, params = tied
    parts = [trainable_tokens([7, 14]), lora(2, target_modules=("embed_tokens",))]
    with pytest.raises(PeftJaxError, match=r"trainable_tokens must come first.*'embed_tokens' already holds 'lora_"):
        started(chain(*parts[::-1]), params)
    method = chain(*parts)
    tuned = moved(method, started(method, params))
    ours = jax.jit(bind(method, model))({"params": tuned}, IDS)
    np.testing.assert_allclose(forward(model, method.merge(tuned)), ours, atol=1e-4 * np.abs(ours).max())


NAMED = {
    "prefix": lambda: prefix(prefix_projection=True), "ptuning": lambda: ptuning(4, "LSTM"),
    "bottleneck": lambda: bottleneck(scaling="channel", ln_before=True), "full": lambda: full(last_n_layers=1),
    "pissa": lambda: lora(init_lora_weights="pissa"), "bitfit": lambda: bitfit(add_missing=True)}


@pytest.mark.parametrize("name", NAMED)
def test_leaves_of_options_are_named_too(tied, name):
    """All that ``init`` adds, and nothing of the model's; of every method's defaults test_every_method.py says so."""
    check_named(NAMED[name](), tied[1])


def check_named(method, params):
    from peft_jax.method import owns

    assert isinstance(method, Method) and method.leaves
    added = flatten(jax.eval_shape(lambda p: method.init(jax.random.key(0), p), params))
    assert {path for path in added if owns(method.leaves, path)} == added.keys() - flatten(params).keys()


UNINITIALISED = {"vera": vera(4, Q), "lora": lora(2, target_modules=Q), "ia3": ia3(Q, ()), "bitfit": bitfit(),
                 "full": full(), "lokr": lokr(2, target_modules=Q), "chain": chain(lora(target_modules=Q), ia3(Q, ()))}


@pytest.mark.parametrize("name", UNINITIALISED)
def test_parameters_without_the_methods_leaves_are_an_error(name):
    """They would be the base model, silently; after merging, too."""
    method = UNINITIALISED[name]
    with pytest.raises(PeftJaxError, match=r"hold none of .*method\.init"):
        bind(method, NET)({"params": BASE}, X)
    with pytest.raises(PeftJaxError, match=r"hold none of .*method\.init"):
        jax.jit(bind(method, NET))({"params": BASE}, X)
    with pytest.raises(PeftJaxError, match=r"hold none of .*method\.init"):
        method.merge(method.merge(started(method, BASE)))


def test_hidden_states_ask_for_the_leaves_too(tied):
    model, params = tied
    with pytest.raises(PeftJaxError, match="hold none of PROMPT_TUNING's leaves"):
        bind(prompt(2), model)({"params": params}, IDS, method="hidden")
    with pytest.raises(PeftJaxError, match="hold none of LORA's leaves"):
        bind(chain(ia3(), lora(2)), model)({"params": started(ia3(), params)}, IDS)


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: chain(full(last_n_layers=2), ln_tuning()),
    lambda: chain(full(last_n_layers=2, exclude=".*_proj.*"), lora(2, modules_to_save=("input_layernorm",)))],
    ids=["ln_tuning", "saved"])  # fmt: skip
def test_bookkeeping_leaves_of_another_method_stay_frozen(tied, make):
    model, params = tied
    method = make()
    tuned = moved(method, started(method, params))
    labels = flatten(method.labels(tuned))
    assert not [path for path, label in labels.items() if path.endswith(("_at", "scaling")) and label != "frozen"]
    ours = jax.jit(bind(method, model))({"params": tuned}, IDS)
    merged = method.merge(tuned)
    np.testing.assert_allclose(forward(model, merged), ours, atol=1e-4 * np.abs(ours).max())
    assert flatten(merged).keys() == flatten(params).keys()


@pytest.mark.parametrize(("methods", "said"), [
    ((lora(2, target_modules=Q), full()), "FULL would train 'layers/self_attn/q_proj/lora_a' too.*FULL first"),
    ((trainable_tokens([7]), lora(2, modules_to_save=("embed_tokens",))), "LORA would train 'embed_tokens/tokens' too"),
    ((lora(2, modules_to_save=("embed_tokens",)), trainable_tokens([7])), "LORA would train 'embed_tokens/tokens' too"),
    ((ia3(), ln_tuning(("norm", "k_proj"))), "LN_TUNING would train 'layers/self_attn/k_proj/ia3_out' too")])
def test_a_trained_leaf_of_another_method_is_an_error(tied, methods, said):
    with pytest.raises(PeftJaxError, match=said):
        started(chain(*methods), tied[1])


def test_the_first_mark_remembers_the_type():
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), {"norm": {"scale": jnp.ones(4)}, **BASE})
    for methods in itertools.permutations([full(".*scale"), ln_tuning(("norm",))]):
        method = chain(*methods)
        merged = method.merge(started(method, base))
        assert {leaf.dtype for leaf in flatten(merged).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: chain(prefix(3), parallel_adapter(bottleneck_size=2)),
    lambda: chain(houlsby(bottleneck_size=2), ln_tuning())], ids=["mam", "houlsby and norms"])  # fmt: skip
def test_chains_train_and_are_stored_bit_for_bit(peer_bases, make, tmp_path):
    _, model, params = peer_bases["llama"]
    method = make()
    tuned = check_training(method, model, params, IDS)
    save_adapter(tmp_path, method, model, tuned)
    check_same_bits(model, params, method, tuned, tmp_path)


@pytest.mark.slow
def test_a_chain_in_a_chain_is_its_parts(tied, tmp_path):
    """Whatever walks the parts sees methods that are none: saving, conversion while reading, labels."""
    model, params = tied
    parts = quantize(block_size=16), lora(2), prefix(3)
    flat, nested = chain(*parts), chain(chain(*parts[:2]), parts[2])
    assert nested.parts == flat.parts == parts and nested.config == flat.config and repr(nested) == repr(flat)
    tuned = moved(nested, started(nested, params))
    save_adapter(tmp_path, nested, model, tuned)
    again, loaded = load_adapter(tmp_path, parts[0].init(None, params))
    assert [part.config["peft_type"] for part in again.parts] == ["LORA", "PREFIX_TUNING"]
    ours, theirs = (jax.jit(bind(method, model))({"params": p}, IDS) for method, p in (
        (nested, tuned), (again, loaded)))
    np.testing.assert_array_equal(ours, theirs)


def test_what_stands_behind_a_method_converts_nothing():
    """A quantisation behind a LoRA sees what that left of the weights, also where the LoRA ends a chain of its own."""
    plain, codes = lora(2, target_modules=Q), quantize(block_size=16)
    assert chain(chain(codes, plain), codes).convert is not None and chain(chain(plain, ia3()), codes).convert is None
    axes = KernelAxes("Dense", (), (16,), (8,))
    kernel = jnp.ones((16, 8))
    first, both = (chain(*some).convert("q_proj/kernel", kernel, axes, ("q_proj",))
                   for some in ((codes, plain), (chain(codes, plain), quantize("int8", block_size=16))))
    assert both.quant_type == first.quant_type == "nf4"


@pytest.mark.slow
def test_a_chain_of_a_list_is_an_error():
    with pytest.raises(PeftJaxError, match="one by one"):
        chain([lora(), ia3()])
