"""Models of which some modules are quantised, saved so that transformers quantises the same ones."""

import jax
import numpy as np
import pytest

from peft_jax import bind, load_pretrained, quantize, save_pretrained

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
bitsandbytes = pytest.importorskip("bitsandbytes")

GPT2 = transformers.GPT2Config(vocab_size=61, n_embd=64, n_layer=2, n_head=2, n_positions=32)
BERT = transformers.BertConfig(vocab_size=61, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                               intermediate_size=128, max_position_embeddings=32)
DISTIL = transformers.DistilBertConfig(vocab_size=61, dim=64, n_layers=2, n_heads=2, hidden_dim=128,
                                       max_position_embeddings=32)


@pytest.mark.slow
@pytest.mark.parametrize("auto, config, targets", [
    ("AutoModelForCausalLM", GPT2, ("mlp.c_proj", "c_attn")),
    ("AutoModelForCausalLM", GPT2, ("attn.c_proj",)),
    ("AutoModel", BERT, ("query", "intermediate.dense")),
    ("AutoModelForSequenceClassification", DISTIL, ("pre_classifier", "q_lin"))],
    ids=["gpt2 mlp", "gpt2 attention", "bert", "distilbert"])
def test_a_last_name_that_quantised_modules_share_is_spelled_out(auto, config, targets, tmp_path):
    torch.manual_seed(0)
    getattr(transformers, auto).from_config(config).save_pretrained(tmp_path / "plain")
    model, base = load_pretrained(tmp_path / "plain")
    method = quantize(target_modules=targets)
    params, ids = method.init(None, base), np.arange(12).reshape(2, 6)
    save_pretrained(tmp_path / "some", model, params)
    opened = getattr(transformers, auto).from_pretrained(tmp_path / "some").eval()
    quantised = {name for name, module in opened.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert quantised == {name for name, _ in opened.named_modules() if name.endswith(targets)}
    opened.enable_input_require_grads()  # else bfloat16, see test_bnb.py
    expected = opened(torch.tensor(ids))[0].detach().float().numpy()
    ours = np.asarray(jax.jit(bind(method, model))({"params": params}, ids))
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()
