"""Full fine-tuning and its parts: what trains, what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import peft_jax
from peft_jax import PeftJaxError, bind, flatten, full, load_adapter, save_adapter, save_pretrained, untie
from peft_jax.cli.console import parameter_counts
from tests import peer, properties

LAST = {"last_n_layers": 2}


def trained_leaves(method, base, axes=None):
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, axes=axes), base)
    return {path: leaf.shape for path, leaf in flatten(peft_jax.partition(params, method.labels(params))[0]).items()}


@pytest.mark.slow
def test_merging_the_whole_keeps_its_types(peer_bases):
    properties.check_merge(full(), *peer_bases["qwen2"][1:], peer.IDS)


@pytest.mark.slow
def test_the_promises_where_some_layers_train(peer_bases):
    """Those of the whole are in test_every_method.py."""
    _, model, base = peer_bases["qwen2"]
    method = full(**LAST)
    properties.check_start_is_base(method, model, base, peer.IDS)
    properties.check_training(method, model, base, peer.IDS)
    properties.check_merge(method, model, base, peer.IDS)
    properties.check_remat(method, model, base, peer.IDS)


def test_everything_trains_and_counts_as_100_percent(peer_bases):
    for name in ("llama", "tied", "qwen2"):
        base, method = peer_bases[name][2], full()
        params = method.init(jax.random.key(0), base)
        assert parameter_counts(method, base, params) == (peft_jax.count(base), peft_jax.count(base))


@pytest.mark.slow
def test_one_step_of_sgd_is_the_plain_gradient(peer_bases):
    """Of a stack of which some layers train the gradient is that of the whole stack, in those layers."""
    _, model, base = peer_bases["llama"]

    def gradient(method):
        params = method.init(jax.random.key(0), base)
        trainable, frozen = peft_jax.partition(params, method.labels(params))

        def loss(leaves):
            logits = bind(method, model)({"params": peft_jax.combine(frozen, leaves)}, peer.IDS)
            return jnp.square(logits).mean()

        return flatten(jax.jit(jax.grad(loss))(trainable))

    whole, last = gradient(full()), gradient(full(**LAST, embeddings=True))
    assert "layers/mlp/up_proj/kernel" not in last
    for path, leaf in whole.items():
        expected, found = (leaf[1:], last[f"full/{path.replace('/', '.')}"]) if path.startswith("layers/") else (
            leaf, last[path])
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(leaf).max(), err_msg=path)


def test_what_trains(peer_bases):
    base = peer_bases["llama"][2]
    assert set(trained_leaves(full("norm/.*|layers/mlp/.*", exclude=".*up_proj.*"), base)) == {
        "layers/mlp/gate_proj/kernel", "layers/mlp/down_proj/kernel", "norm/scale"}
    last = trained_leaves(full(last_n_layers=1), base)
    assert last["full/layers.self_attn.q_proj.kernel"] == (1, 16, 16)
    assert {"norm/scale", "lm_head/kernel"} < set(last) and "embed_tokens/embedding" not in last
    assert set(trained_leaves(full(**LAST, embeddings=True, head=False), base)) - set(last) == {
        "embed_tokens/embedding"}
    everything = trained_leaves(full(), base)
    assert everything.keys() - trained_leaves(full(head=False, embeddings=False), base).keys() == {
        "embed_tokens/embedding", "lm_head/kernel"}
    assert trained_leaves(full(last_n_layers=3, embeddings=True), base) == everything


@pytest.mark.slow
def test_layers_that_are_modules_of_their_own(peer_bases):
    """Without a scan, and with a scan over DenseGeneral kernels, the last layer is found too."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return x + nn.LayerNorm(name="ln")(nn.DenseGeneral(4, axis=-1, name="dense")(x)), None

    class Net(nn.Module):
        scanned: bool

        @nn.compact
        def __call__(self, x):
            if self.scanned:
                scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
                return scan(name="layers")(x, None)[0]
            for i in range(3):
                x, _ = Block(name=f"layers_{i}")(x)
            return x

    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    for scanned in (True, False):
        model = Net(scanned)
        base = model.init(jax.random.key(0), x)["params"]
        axes = peft_jax.kernel_axes(model, base, x)
        method = full(last_n_layers=1)
        params = properties.moved(method, method.init(jax.random.key(0), base, axes=axes))
        prefix = "full/layers." if scanned else "layers_2/"
        found = trained_leaves(method, base, axes)
        assert len(found) == 4 and all(path.startswith(prefix) for path in found)
        np.testing.assert_allclose(bind(method, model)({"params": params}, x),
                                   model.apply({"params": method.merge(params)}, x), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [LAST, {"last_n_layers": 1, "embeddings": True}, {"head": False},
                                     {"patterns": ("norm/.*", ".*q_proj.*")}])
@pytest.mark.parametrize("name", ["tied", "qwen2"])
def test_a_part_is_stored_whole_and_loads_as_the_same_bits(peer_bases, name, options, tmp_path):
    _, model, base = peer_bases[name]
    method = full(**options)
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, tuned)
    peer.check_same_bits(model, base, method, tuned, tmp_path)
    from safetensors.numpy import load_file

    stored = sum(tensor.size for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert stored == parameter_counts(method, base, tuned)[0]


def test_a_part_of_a_model_that_is_not_ours_is_stored_too(tmp_path):
    base = {"layers": {"up": {"kernel": np.ones((3, 4, 5), np.float32), "bias": np.ones((3, 5), np.float32)}}}
    method = full(last_n_layers=2)
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, None, tuned)
    peer.check_same_bits(None, base, method, tuned, tmp_path)


@pytest.mark.slow
def test_the_whole_is_stored_as_a_model(peer_bases, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, model, base = peer_bases["qwen2"]
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    method = full()
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    with pytest.raises(PeftJaxError, match="FULL has no adapter file: save the whole model"):
        save_adapter(tmp_path, method, model, tuned)
    both = peft_jax.chain(method, peft_jax.ia3())
    with pytest.raises(PeftJaxError, match="FULL has no adapter file"):
        save_adapter(tmp_path, both, model, both.init(jax.random.key(0), base))
    merged = method.merge(tuned)
    assert {leaf.dtype.name for leaf in flatten(merged).values()} == {"bfloat16"}
    save_pretrained(tmp_path, model, merged)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    peer.assert_close(peer.forward(model, merged), peer.torch_logits(theirs))


@pytest.mark.parametrize("options, words", [
    ({"patterns": "layers/.*/kernl"}, "matches no leaf of this model"),
    ({"patterns": "("}, "no regular expression"),
    ({"patterns": (5,)}, "give regular expressions"),
    ({"last_n_layers": 0}, "at least 1"),
    ({"last_n_layers": 4}, "this model has 3 numbered layers"),
    ({"patterns": "lm_head/.*", "head": False}, "leaves nothing to train"),
    ({"head": "no"}, "head='no'"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(peer_bases, options, words):
    with pytest.raises(PeftJaxError, match=words):
        full(**options).init(jax.random.key(0), peer_bases["llama"][2])


def test_integers_do_not_train():
    with pytest.raises(PeftJaxError, match=r"'codes' cannot train: .* Leave it out"):
        full().init(jax.random.key(0), {"codes": jnp.ones(3, jnp.int32)})


@pytest.mark.slow
def test_a_head_of_its_own_on_a_tied_model(peer_bases, tmp_path):
    _, model, base = peer_bases["tied"]
    method, base = full("lm_head/.*"), untie(base)
    tuned = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, tuned)
    _, loaded = load_adapter(tmp_path, base)
    np.testing.assert_array_equal(loaded["lm_head"]["kernel"], tuned["lm_head"]["kernel"])
