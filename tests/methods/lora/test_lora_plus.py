"""LoRA+: its groups train at their own rates, as with peft's optimiser; the file is a LoRA's."""

import jax
import numpy as np
import pytest

import peft_jax
from configs.base import get_config
from peft_jax import PeftJaxError, bind, chain, flatten, load_adapter, lora, loraplus, partition, save_adapter
from peft_jax.cli.build_optimizer import build_optimizer
from peft_jax.train.step import init_state, make_step
from tests import peer, properties

peft = pytest.importorskip("peft")


def optim(**options):
    config = get_config().optim
    config.update({"learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0.0, "clip_norm": 0.0, **options})
    return config


def steps(method, model, params, config, count=3):
    labels = method.labels(params)
    trainable, frozen = partition(params, labels)
    tx = build_optimizer(config, count, labels)
    step, state = make_step(bind(method, model), tx, 64), init_state(trainable, tx, jax.random.key(1))
    for _ in range(count):
        state, _ = step(state, frozen, properties.batch_of(peer.IDS))
    return flatten(peft_jax.combine(frozen, state.trainable))


@pytest.mark.slow
@pytest.mark.parametrize(("bias", "decay"), [("none", 0.1), ("lora_only", 0.0)])
def test_the_groups_train_as_with_peft_s_optimiser(peer_bases, bias, decay, tmp_path):
    """Three steps of AdamW from one start: the same parameters here and in torch, which never decays biases."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    fresh, model, base = peer_bases["qwen2"]
    torch.manual_seed(1)
    theirs = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, bias=bias, init_lora_weights=False,
                                                          task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path / "start")
    adam = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16.0,
                                     loraplus_weight_decay=decay)
    for _ in range(3):
        adam.zero_grad()
        theirs(torch.tensor(peer.IDS), labels=torch.tensor(peer.IDS)).loss.backward()
        adam.step()
    theirs.save_pretrained(tmp_path / "end")

    start = load_adapter(tmp_path / "start", base)[1]
    expected = flatten(load_adapter(tmp_path / "end", base)[1])
    method = loraplus(r=2, bias=bias)
    found = steps(method, model, start, optim(rates={"lora_b": 16.0}, weight_decay=decay))
    for path, leaf in found.items():
        moved = np.abs(expected[path] - flatten(start)[path]).max()
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-3 * moved, err_msg=path)


@pytest.mark.slow
def test_the_first_step_of_adam_shows_the_rates(peer_bases):
    """Adam's first step moves every leaf with a gradient by its rate."""
    _, model, base = peer_bases["llama"]
    method = loraplus(r=2, target_modules=("q_proj", "embed_tokens"), init_lora_weights=False)
    before = method.init(jax.random.key(0), base)
    after = steps(method, model, before, optim(rates={"lora_b": 16.0, "lora_embedding": 0.5}), 1)
    moved = {path: float(np.abs(after[path] - leaf).max()) for path, leaf in flatten(before).items()}
    rates = {"layers/self_attn/q_proj/lora_a": 1e-2, "layers/self_attn/q_proj/lora_b": 16e-2,
             "embed_tokens/lora_a": 5e-3, "embed_tokens/lora_b": 5e-3}
    assert {path: pytest.approx(rate, rel=1e-3) for path, rate in rates.items()} == {
        path: size for path, size in moved.items() if size}


def test_a_group_without_a_rate_and_a_rate_without_its_group_are_errors(peer_bases):
    base = peer_bases["llama"][2]
    grouped, plain = (method.labels(method.init(jax.random.key(0), base)) for method in (loraplus(), lora()))
    with pytest.raises(PeftJaxError, match=r"'lora_b' at a rate of its own: give .*--config.optim.rates="):
        build_optimizer(optim(), 3, grouped)
    with pytest.raises(PeftJaxError, match="'lora_b', a group of leaves that the method does not have"):
        build_optimizer(optim(rates={"lora_b": 2}), 3, plain)
    with pytest.raises(PeftJaxError, match=r"rates\['lora_b'\]='fast'"):
        build_optimizer(optim(rates={"lora_b": "fast"}), 3, grouped)


def test_the_file_is_a_lora_s(peer_bases, tmp_path):
    _, model, base = peer_bases["llama"]
    method = loraplus(r=2)
    params = properties.moved(method, method.init(jax.random.key(0), base))
    save_adapter(tmp_path, method, model, params)
    again, loaded = load_adapter(tmp_path, base)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert set(flatten(again.labels(loaded)).values()) == {"trainable", "frozen"}


def test_in_a_chain_the_groups_stay(peer_bases):
    base = peer_bases["llama"][2]
    method = chain(loraplus(r=2), peft_jax.ia3(target_modules=("down_proj",)))
    labels = flatten(method.labels(method.init(jax.random.key(0), base)))
    assert {path.rpartition("/")[2]: label for path, label in labels.items() if label != "frozen"} == {
        "lora_a": "trainable", "lora_b": "lora_b", "ia3_in": "trainable"}
