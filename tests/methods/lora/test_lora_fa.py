"""LoRA-FA: A stays and is stored; peft opens the file as a LoRA and trains the same B with A frozen."""

import jax
import numpy as np
import pytest

import peft_jax
from peft_jax import flatten, load_adapter, lora, lorafa, save_adapter
from tests import peer, properties

peft = pytest.importorskip("peft")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"target_modules": "all-linear"}, {"layers_to_transform": [0, 2], "bias": "all"}])
def test_the_file_opens_in_peft_and_loads_as_a_lora(peer_bases, options, tmp_path):
    fresh, model, base = peer_bases["qwen2"]
    method = lorafa(r=2, **options)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    peer.assert_close(peer.forward(model, method.merge(params)), peer.torch_logits(theirs))
    again, loaded = load_adapter(tmp_path, base)
    folder = "layers/self_attn/q_proj/"
    on = np.asarray(flatten(params)[folder + "lora_scaling"]) > 0
    for leaf in ("lora_a", "lora_b"):
        one, other = (np.asarray(flatten(tree)[folder + leaf])[on] for tree in (params, loaded))
        np.testing.assert_array_equal(one, other)
    assert flatten(again.labels(loaded))[folder + "lora_a"] == "trainable"


def test_only_half_is_counted(peer_bases):
    base = peer_bases["llama"][2]
    for method, each in ((lora(r=2), 16 + 16), (lorafa(r=2), 16)):
        params = method.init(jax.random.key(0), base)
        trainable, _ = peft_jax.partition(params, method.labels(params))
        assert peft_jax.count(peft_jax.combine(trainable)["layers"]["self_attn"]["q_proj"]) == 3 * 2 * each
    method = lorafa(r=2, layers_to_transform=1)
    assert method.padding(method.init(jax.random.key(0), base)) == 2 * (2 * 16 + 2 * 8)


@pytest.mark.slow
def test_b_trains_as_in_torch_with_a_frozen(peer_bases, tmp_path):
    import torch

    fresh, model, base = peer_bases["llama"]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "start")
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    peer.train_there(theirs, 3)
    theirs.save_pretrained(tmp_path / "end")
    method, start = lorafa(r=2), load_adapter(tmp_path / "start", base)[1]
    expected = flatten(load_adapter(tmp_path / "end", base)[1])
    for path, leaf in flatten(properties.trained(method, model, start, peer.IDS)).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)
