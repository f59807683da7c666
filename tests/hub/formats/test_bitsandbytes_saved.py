"""Quantised weights saved as bitsandbytes saves them, those merged and quantised again too; transformers opens them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from peft_jax import chain, lora, quant, quantize, requantize
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub.load import load_pretrained
from peft_jax.hub.save import save_pretrained
from tests.hub.formats.test_bitsandbytes import assert_logits, nested, plain  # noqa: F401, the fixtures of checkpoints
from tests.properties import moved

transformers = pytest.importorskip("transformers")


@pytest.mark.slow
def test_quantised_weights_are_saved_as_bitsandbytes_saves_them(nested, tmp_path):  # noqa: F811
    folder, _ = nested
    model, params = load_pretrained(folder)
    save_pretrained(tmp_path, model, params)
    ours, expected = (load_file(where / "model.safetensors") for where in (tmp_path, folder))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        if "quant_state" in name:
            assert json.loads(ours[name].tobytes()) == json.loads(tensor.tobytes())
        else:
            assert ours[name].dtype == tensor.dtype and np.array_equal(ours[name], tensor), name
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_logits(model, params, again, 1e-5)


@pytest.mark.slow
def test_merged_and_quantised_again(plain, tmp_path):  # noqa: F811
    """The error is reported by leaf, and transformers opens what is saved with the same logits."""
    method = chain(quantize(), lora(r=2, target_modules=("q_proj",)))
    model, base = load_pretrained(plain, method=method)
    params = moved(method, method.init(jax.random.key(0), base), by=0.05)
    merged = method.merge(params)
    again, errors = requantize(merged, base)
    changed = "layers/self_attn/q_proj/kernel"
    for path, error in errors.items():  # what no adapter changed is on its codes' values already
        assert error < 1e-6 if path != changed else 0.02 < error < 0.2, path
    packed = tree.flatten(again)[changed]
    difference = np.asarray(quant.dequantize(packed)) - np.asarray(tree.flatten(merged)[changed])
    size = np.sqrt(np.square(tree.flatten(merged)[changed]).mean())
    np.testing.assert_allclose(errors[changed], np.sqrt(np.square(difference).mean()) / size, rtol=1e-5)
    save_pretrained(tmp_path, model, again)
    assert_logits(model, again, transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), 1e-5)
    with pytest.raises(PeftJaxError, match="params have no plain 'layers/"):
        requantize(again, base)


@pytest.mark.slow
@pytest.mark.parametrize("method, words", [
    (quantize("int8"), "is int8 in blocks of 64, and quantised weights are saved as bitsandbytes'"),
    (chain(quantize(target_modules=("q_proj",)), quantize("fp4", target_modules=("v_proj",))), "in several ways"),
], ids=["int8", "two ways"])
def test_leaves_that_bitsandbytes_cannot_hold_are_not_saved(plain, tmp_path, method, words):  # noqa: F811
    model, params = load_pretrained(plain)
    with pytest.raises(PeftJaxError, match=words):
        save_pretrained(tmp_path / "new", model, method.init(jax.random.key(0), params))
    assert not (tmp_path / "new").exists()
