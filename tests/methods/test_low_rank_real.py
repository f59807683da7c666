"""The real SmolLM2 with updates of low rank or few parameters: adapters exchanged with real peft."""

from inspect import signature

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax import bind, load_adapter, save_adapter
from tests import peer, properties

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

# name: (peft's config, what both are made with, how far leaves are moved to change the logits by some percent)
KINDS = {
    "adalora": ("AdaLoraConfig", {"total_step": 4}, 0.15),
    "hra": ("HRAConfig", {"r": 2}, 0.1),
    "ia3": ("IA3Config", {}, 0.3),
    "loha": ("LoHaConfig", {"r": 4}, 0.1),
    "lokr": ("LoKrConfig", {"r": 4, "decompose_both": True}, 0.1),
    "oft": ("OFTConfig", {"oft_block_size": 8}, 0.05),
    "vera": ("VeraConfig", {}, 0.3),
}
LAYERS = {"layers_to_transform": [0, 7, 29]}  # quicker in torch


@pytest.mark.real
@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_exchanges_adapters_with_peft(smollm2, smollm2_peer, kind, tmp_path):
    model, base, tokenizer = smollm2
    ids = tokenizer(["Review: a delight.\nIn one word, the movie is"], return_tensors="np")["input_ids"]
    name, options, by = KINDS[kind]
    options = options | (LAYERS if "layers_to_transform" in signature(getattr(peft_jax, kind)).parameters else {})

    def logits(theirs):
        with torch.no_grad():
            return theirs.eval()(torch.tensor(ids)).logits.numpy()

    plain = np.asarray(properties.plain_logits(model, base, ids))  # compiled once for all
    method = getattr(peft_jax, kind)(**options)
    params = properties.moved(method, method.init(jax.random.key(0), base), by=by)
    save_adapter(tmp_path / "ours", method, model, params)
    ours = np.asarray(jax.jit(bind(method, model))({"params": params}, ids))
    peer.assert_close(ours, logits(peft.PeftModel.from_pretrained(smollm2_peer(), tmp_path / "ours")))
    assert np.abs(ours - plain).max() > 1e-2 * np.abs(ours).max()

    theirs = peft.get_peft_model(smollm2_peer(), getattr(peft, name)(task_type="CAUSAL_LM", **options))
    peer.train_there(theirs, ids=ids, rate=0.01)
    theirs.save_pretrained(tmp_path / "theirs")
    method, params = load_adapter(tmp_path / "theirs", base)
    peer.assert_close(properties.plain_logits(model, method.merge(params), ids), logits(theirs))
