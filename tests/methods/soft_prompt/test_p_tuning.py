"""P-tuning: its encoders against torch's, folded away at save; what becomes of the embeddings is prompt tuning's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax
from peft_jax import PeftJaxError, bind, chain, lora, ptuning
from peft_jax.methods.soft_prompt.p_tuning import encode
from tests import peer, properties

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

CASES = {
    "mlp": {},
    "mlp of another size": {"encoder_hidden_size": 5},
    "lstm": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6},
    "three lstms": {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3, "encoder_hidden_size": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "mlp"])
def test_moved_here_opens_in_peft(peer_bases, case, tmp_path):
    peer.check_opens_in_peft(peer_bases["llama"], ptuning(4, **CASES[case]), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mlp", "lstm"])
def test_trained_by_peft_loads_here(peer_bases, case, tmp_path):
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **CASES[case])
    method, params = peer.check_loads_from_peft(peer_bases["tied"], config, tmp_path / "theirs", whole=False)
    peft_jax.save_adapter(tmp_path / "again", method, peer_bases["tied"][1], params)
    peer.check_same_bits(*peer_bases["tied"][1:], method, params, tmp_path / "again")


@pytest.mark.parametrize("case", CASES)
def test_encoders_are_torchs(case):
    """torch's weights moved here make the same embeddings, and there are as many of them."""
    config = peft.PromptEncoderConfig(num_virtual_tokens=7, token_dim=8, num_transformer_submodules=1,
                                      **{"encoder_hidden_size": 8, **CASES[case]})
    torch.manual_seed(0)
    theirs = peft.PromptEncoder(config)
    held = {name: value.detach().numpy() for name, value in theirs.named_parameters()}
    leaves, dense = {}, [name for name in held if name.startswith("mlp_head") and name.endswith("weight")]
    for i, name in enumerate(dense):
        leaves |= {f"w{i}": held[name].T, f"b{i}": held[name.replace("weight", "bias")]}
    for layer in range(config.encoder_num_layers if "lstm" in case else 0):
        names = [f"lstm_head.{{}}_l{layer}{way}" for way in ("", "_reverse")]
        both = {kind: [held[name.format(kind)] for name in names] for kind in
                ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        leaves |= {f"lstm{layer}_in": np.stack(both["weight_ih"]).transpose(0, 2, 1),
                   f"lstm{layer}_hidden": np.stack(both["weight_hh"]).transpose(0, 2, 1),
                   f"lstm{layer}_bias": np.stack([both["bias_ih"], both["bias_hh"]], axis=1)}
    method = ptuning(7, **{"encoder_hidden_size": 8, **CASES[case]})
    ours = method.init(jax.random.key(0), {"embed_tokens": {"embedding": jnp.ones((9, 8))}})["embed_tokens"]
    shapes = jax.tree.map(jnp.shape, ours["prompt_encoder"])
    assert shapes == jax.tree.map(jnp.shape, leaves)
    assert peft_jax.count(ours) - 72 == sum(parameter.numel() for parameter in theirs.parameters())
    made = jax.jit(lambda x, tree: encode(method.config, x, tree))(held["embedding.weight"], leaves)
    np.testing.assert_allclose(made, theirs(torch.arange(7)[None])[0].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_lstm_trains(peer_bases):
    """The MLP does in test_every_method.py."""
    properties.check_training(ptuning(4, **CASES["lstm"]), *peer_bases["llama"][1:], peer.IDS)


@pytest.mark.slow
def test_packing_padding_and_a_cache_change_nothing(peer_bases):
    """Beside LoRA, which the cache of virtual tokens must go through as well."""
    _, model, base = peer_bases["llama"]
    method = chain(lora(r=2), ptuning(4))
    properties.check_packing(method, model, base, peer.IDS)
    properties.check_decoding(method, model, base, peer.IDS)


@pytest.mark.slow
def test_dropout_between_the_layers_of_the_lstm(peer_bases):
    _, model, base = peer_bases["llama"]
    method = ptuning(4, "LSTM", encoder_hidden_size=8, encoder_dropout=0.5)
    params, apply = method.init(jax.random.key(0), base), bind(method, model)
    one, same, other = (apply({"params": params}, peer.IDS, rngs={"dropout": jax.random.key(seed)})
                        for seed in (0, 0, 1))  # fmt: skip
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    still = ptuning(4, "LSTM", encoder_hidden_size=8)
    np.testing.assert_array_equal(apply({"params": params}, peer.IDS), bind(still, model)({"params": params}, peer.IDS))


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "message"), [
    ({"encoder_reparameterization_type": "GRU"}, "encoder_reparameterization_type='GRU'"),
    ({"encoder_dropout": 1.0}, "encoder_dropout=1.0"), ({"encoder_hidden_size": 0}, "encoder_hidden_size=0"),
    ({"encoder_num_layers": 3}, "act in the LSTM only"), ({"encoder_dropout": 0.1}, "act in the LSTM only"),
])  # fmt: skip
def test_what_cannot_be_meant_is_an_error(arguments, message):
    with pytest.raises(PeftJaxError, match=message):
        ptuning(**arguments)
