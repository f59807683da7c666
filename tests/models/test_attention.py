"""Which program computes attention, and that the GPU's, lowered here without one, is flash attention."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from peft_jax import PeftJaxError, bind, load_pretrained, lora, make_mesh, prefix
from peft_jax.models import attention
from peft_jax.models.llama import CausalLM, LlamaConfig

SIZES = LlamaConfig(64, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 64, True)
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")


def shape(tokens=16, size=64, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, tokens, 4, size), dtype)


@pytest.mark.parametrize(("query", "key", "device", "fits"), [
    (shape(), shape(), H100, True),
    (shape(dtype=jnp.float16), shape(tokens=36), H100, True),
    (shape(size=128), shape(size=128), SimpleNamespace(platform="gpu", compute_capability="8.0"), True),
    (shape(), shape(), SimpleNamespace(platform="gpu", compute_capability="7.5"), False),
    (shape(), shape(), SimpleNamespace(platform="gpu", compute_capability="gfx90a"), False),
    (shape(), shape(), SimpleNamespace(platform="tpu"), False),
    (shape(), shape(), None, False),
    (shape(dtype=jnp.float32), shape(), H100, False),
    (shape(size=60), shape(size=60), H100, False),
    (shape(size=256), shape(size=256), H100, False),
    (shape(tokens=1), shape(), H100, False),
    (shape(), shape(tokens=37), H100, False),
])
def test_flash_attention_is_chosen_where_it_can_be(query, key, device, fits):
    assert attention.flash_fits(query, key, device) is fits


def lowered(method, monkeypatch, implementation):
    """The training gradient of a small bfloat16 model, lowered for CUDA; the library's version is not there to ask."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    here = CausalLM(SIZES, jnp.bfloat16, jnp.bfloat16)  # which can also run
    params = method.init(jax.random.key(0), here.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    apply = bind(method, here.clone(config=replace(SIZES, attn_implementation=implementation)))

    def loss(params, ids):
        return apply({"params": params}, ids, segment_ids=jnp.ones_like(ids), method="hidden").sum().astype(jnp.float32)

    traced = jax.jit(jax.grad(loss)).trace(params, jnp.zeros((2, 16), jnp.int32))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", [lora(r=2), prefix(num_virtual_tokens=4)], ids=["lora", "prefix"])
def test_a_model_with_cudnn_lowers_to_flash_attention_forward_and_back(method, monkeypatch):
    text = lowered(method, monkeypatch, "cudnn")
    assert len(re.findall(r"__cudnn\$fmhaScaleBiasSoftmax\b", text)) >= 1
    assert len(re.findall(r"__cudnn\$fmhaScaleBiasSoftmaxBackward\b", text)) == 1
    assert "__cudnn" not in lowered(method, monkeypatch, "auto")  # there is no GPU here


def test_an_unknown_implementation_says_which_there_are():
    model = CausalLM(replace(SIZES, attn_implementation="flash"))
    with pytest.raises(PeftJaxError, match=r"attn_implementation='flash'.*auto, xla, cudnn, splash"):
        model.init(jax.random.key(0), np.zeros((1, 2), np.int32))


@pytest.mark.parametrize(("query", "device", "wants"), [
    (shape(), None, "an NVIDIA GPU"), (shape(dtype=jnp.float32), H100, "model.dtype=bfloat16, not float32"),
    (shape(size=60), H100, "heads of a multiple of 8"), (shape(tokens=1), H100, ""),
])
def test_what_flash_attention_lacks_is_said(query, device, wants):
    assert attention.flash_lacks(query, device).startswith(wants) and bool(wants) == bool(
        attention.flash_lacks(query, device))


def test_cudnn_without_a_gpu_is_an_error_that_says_so():
    with pytest.raises(PeftJaxError, match="attn_implementation='cudnn' wants an NVIDIA GPU from Ampere on"):
        attention.check_device(replace(SIZES, attn_implementation="cudnn"), jnp.bfloat16)
    attention.check_device(replace(SIZES, attn_implementation="cudnn"), jnp.bfloat16, H100)
    attention.check_device(SIZES, jnp.bfloat16)
    with pytest.raises(PeftJaxError, match="attn_implementation='splash' wants a TPU"):
        attention.check_device(replace(SIZES, attn_implementation="splash"), jnp.bfloat16)


def test_heads_that_a_mesh_cannot_share_evenly_do_without_cudnn():
    """jax refuses to cut cuDNN's program where queries and keys are cut differently: 4 heads and 2 of keys over 8."""
    assert [attention.on_heads("auto", SIZES, parts) for parts in (1, 2, 4, 8)] == ["auto", "auto", "xla", "xla"]
    assert attention.on_heads("cudnn", SIZES, 2) == "cudnn" and attention.on_heads("xla", SIZES, 3) == "xla"
    with pytest.raises(PeftJaxError, match=r"mesh\.tensor=4: the model's 4 heads, 2 of keys"):
        attention.on_heads("cudnn", SIZES, 4)


@pytest.mark.slow
def test_a_model_read_onto_a_mesh_has_attention_that_can_be_cut(tiny_folder):
    found = [load_pretrained(tiny_folder, mesh=make_mesh(1, 1, parts))[0].config.attn_implementation
             for parts in (2, 4)]
    assert found == ["auto", "xla"]
