"""LoRA's variants on the real SmolLM2, exchanged with real peft both ways."""

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax import bind, dora, flatten, load_adapter, lora, lorafa, save_adapter, unflatten
from tests.peer import assert_close, train_there
from tests.properties import moved, plain_logits

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.real

# name: (method, its arguments, LoraConfig's arguments beside them)
CASES = {
    "dora": (dora, {}, {"use_dora": True}),
    "pissa": (lora, {"init_lora_weights": "pissa_niter_4", "lora_alpha": 4}, None),
    "olora": (lora, {"init_lora_weights": "olora", "target_modules": ("k_proj",)}, None),
    "eva": (lora, {"init_lora_weights": "eva"}, None),
    "lorafa": (lorafa, {}, None),
    "embedding": (lora, {"target_modules": ("embed_tokens",)}, {"ensure_weight_tying": True}),
}


def logits(theirs, ids):
    import torch

    with torch.no_grad():
        return theirs.eval()(torch.tensor(ids)).logits.numpy()


def own_logits(method, model, params, ids):
    return np.asarray(jax.jit(bind(method, model))({"params": params}, ids))


def _moved(method, params, rows):
    """Moved at random; where ranks differ in ``rows`` that every layer has, for padding must stay zero."""
    before, after = flatten(params), flatten(moved(method, params, by=0.02))
    return unflatten({path: leaf.at[rows[path.rpartition("/")[2]]].set(after[path][rows[path.rpartition("/")[2]]])
                      if path.rpartition("/")[2] in rows else after[path] for path, leaf in before.items()})


@pytest.fixture(scope="module")
def both(smollm2, smollm2_peer):
    """(makes a fresh torch model, its Flax model, params, token ids (2, 8))."""
    model, params, tokenizer = smollm2
    text = "Review: a delight.\nIn one word, the movie is good. Gravity pulls."
    return smollm2_peer, model, params, tokenizer(text, return_tensors="np")["input_ids"][:, :16].reshape(2, 8)


@pytest.mark.parametrize("case", CASES)
def test_smollm2_moved_here_opens_in_peft(both, case, tmp_path):
    fresh, model, base, ids = both
    make, options, _ = CASES[case]
    method = make(r=4, **options)
    if method.prepare:
        method = method.prepare(model, base, [{"input_ids": ids}, {"input_ids": ids[:, ::-1]}])
    params, apply = method.init(jax.random.key(0), base), jax.jit(bind(method, model))
    assert_close(apply({"params": params}, ids), np.asarray(plain_logits(model, base, ids)))
    rows = {"lora_a": np.s_[..., :1], "lora_b": np.s_[..., :1, :]} if case == "eva" else {}
    params = _moved(method, params, rows)
    save_adapter(tmp_path, method, model, params)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    assert_close(apply({"params": params}, ids), logits(theirs, ids))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2] is not None])
def test_smollm2_trained_by_peft_loads_here(both, case, tmp_path):
    fresh, model, base, ids = both
    _, options, more = CASES[case]
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **more, **{
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items()})
    theirs = peft.get_peft_model(fresh(), config)
    train_there(theirs, ids=ids, rate=0.01)
    theirs.save_pretrained(tmp_path)
    method, params = load_adapter(tmp_path, base)
    assert peft_jax.count(peft_jax.partition(params, method.labels(params))[0]) > 0
    assert_close(own_logits(method, model, params, ids), logits(theirs, ids))
