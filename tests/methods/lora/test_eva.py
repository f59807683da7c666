"""EVA: vectors, shares and ranks against numpy and real peft, and a start that is the base model."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from peft_jax import PeftJaxError, chain, dora, flatten, ia3, lora
from tests import peer, properties

peft = pytest.importorskip("peft")

IDS = np.random.default_rng(3).integers(0, peer.SIZES["vocab_size"], (8, 12))
BATCH = {"input_ids": IDS, "segment_ids": np.ones_like(IDS)}
OPTIONS = {"r": 2, "lora_alpha": 4, "target_modules": ("q_proj", "v_proj", "down_proj"), "init_lora_weights": "eva"}


class Plain(nn.Module):
    """One layer whose input is known: the embedding of the ids."""

    @nn.compact
    def __call__(self, input_ids, positions=None, segment_ids=None, lengths=None):
        return nn.Dense(3, name="out")(nn.Embed(37, 6, name="table")(input_ids))


@pytest.fixture(scope="module")
def known():
    model = Plain()
    params = model.init(jax.random.key(0), IDS)["params"]
    return model, params, np.asarray(params["table"]["embedding"])


def prepared(known, batches, **options):
    """(method, its A (in, r)) of a LoRA on the known layer."""
    method = lora(target_modules=("out",), init_lora_weights="eva", **options).prepare(*known[:2], batches)
    return method, np.asarray(method.init(jax.random.key(0), known[1])["out"]["lora_a"])


@pytest.mark.slow
def test_vectors_are_those_of_the_centred_real_inputs(known):
    """In two batches of different length with padding; rank times rho is full, so that nothing is cut between them."""
    real = np.ones_like(IDS)
    real[:, 9:] = 0
    batches = [{"input_ids": IDS[:5], "segment_ids": real[:5]},
               {"input_ids": IDS[None, 5:], "lengths": np.array([[9, 9, 9]])}]
    x = known[2][IDS][real > 0]
    _, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    method, a = prepared(known, batches, r=6, eva_config={"tau": 1.0})
    np.testing.assert_allclose(np.abs(v @ a), np.eye(6), atol=2e-3)
    _, a = prepared(known, batches, r=6, eva_config={"tau": 1.0, "whiten": True})
    np.testing.assert_allclose(np.linalg.norm(a, axis=0), 1 / np.sqrt(s), rtol=1e-4)
    assert method.prepare is None and method.config["rank_pattern"] == {}


@pytest.mark.slow
def test_it_ends_when_no_vector_turns(known):
    """The same batch again turns nothing, so the third is never taken."""
    taken = []

    def batches():
        for index in range(3):
            taken.append(index)
            yield BATCH

    prepared(known, batches(), r=2)
    assert taken == [0, 1]


@pytest.mark.slow
def test_vectors_and_ranks_are_peft_s(peer_bases):
    import torch
    from peft.tuners.lora.eva import get_eva_state_dict

    fresh, model, base = peer_bases["llama"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", eva_config=peft.EvaConfig(rho=2.0),
                             **OPTIONS | {"target_modules": list(OPTIONS["target_modules"])})
    data = [{"input_ids": torch.tensor(IDS), "attention_mask": torch.ones(IDS.shape, dtype=torch.long)}]
    theirs = get_eva_state_dict(fresh(), data, config, show_progress_bar=False)
    method = lora(**OPTIONS).prepare(model, base, [BATCH])
    params = flatten(method.init(jax.random.key(0), base))
    ranks = {name: a.shape[0] for name, a in theirs.items()}
    own = {}
    for name, vectors in theirs.items():
        _, layers, layer, *module = name.split(".")
        path = "/".join((layers, *module, "lora_a"))
        a = np.asarray(params[path][int(layer)]) if path in params else np.zeros((1, 0))
        own[name] = int(np.abs(a).any(0).sum())
        most = min(own[name], ranks[name])
        turned = np.abs((vectors[:most].numpy() * a.T[:most]).sum(1))
        np.testing.assert_allclose(turned, 1, atol=1e-3, err_msg=name)
    q, v = (np.array([n for name, n in counts.items() if kind in name]) for counts, kind in
            ((own, "q_proj"), (own, "v_proj")))
    assert sum(own.values()) == sum(ranks.values()) == 3 * 3 * 2
    # Queries and values have one input: which of them takes the last of two equal shares is up to the order.
    assert {n: k for n, k in own.items() if "down" in n} == {n: k for n, k in ranks.items() if "down" in n}
    both = [sum(ranks[n] for n in ranks if f".{layer}.self_attn" in n) for layer in range(3)]
    assert np.abs((q + v) - both).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("make", [lora, dora])
def test_the_file_opens_in_peft(peer_bases, make, tmp_path):
    fresh, model, base = peer_bases["llama"]
    method = make(**OPTIONS, modules_to_save=("norm",)).prepare(model, base, [BATCH])
    peer.check_opens_in_peft((fresh, model, base), method, tmp_path, change=peer.trained_here((fresh, model, base)))


@pytest.mark.slow
def test_the_start_is_the_base_and_the_scales_stay(peer_bases):
    _, model, base = peer_bases["llama"]
    method = chain(lora(**OPTIONS), ia3(target_modules=("k_proj",), feedforward_modules=()))
    method = method.prepare(model, base, [BATCH])
    properties.check_start_is_base(method, model, base, peer.IDS)
    params = flatten(method.init(jax.random.key(0), base))
    scales = np.concatenate([leaf.ravel() for path, leaf in params.items() if path.endswith("lora_scaling")])
    np.testing.assert_allclose(scales[scales > 0], 2.0)  # lora_alpha grows with the rank
    kept = lora(**OPTIONS, eva_config={"rho": 1.0}).prepare(model, base, [BATCH])
    assert kept.config["rank_pattern"] == {} and len(kept.config["target_modules"]) == 9


def test_what_cannot_be_seen_is_an_error(known):
    model, params, _ = known
    method = lora(target_modules=("out",), init_lora_weights="eva")
    with pytest.raises(PeftJaxError, match="there are no batches"):
        method.prepare(model, params, [])
    uncalled = params | {"other": params["out"]}
    with pytest.raises(PeftJaxError, match="the inputs of 'other' cannot be seen"):
        lora(target_modules=("other",), init_lora_weights="eva").prepare(model, uncalled, [BATCH])
    with pytest.raises(PeftJaxError, match=r"rho=0\.5 must be at least 1"):
        lora(eva_config={"rho": 0.5})
