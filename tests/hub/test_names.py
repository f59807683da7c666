import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.hub import names


def test_modules_go_there_and_back():
    for path in names.MODULES:
        layer = 11 if path.startswith("layers/") else None
        assert names.our_module(names.hf_module(path, layer)) == (path, layer)


def test_tensors_of_each_layer():
    places = names.tensors(["layers/self_attn/q_proj/bias", "layers/mlp/up_proj/kernel", "norm/scale"], 2)
    assert places == {
        "model.layers.0.self_attn.q_proj.bias": ("layers/self_attn/q_proj/bias", 0, False),
        "model.layers.1.self_attn.q_proj.bias": ("layers/self_attn/q_proj/bias", 1, False),
        "model.layers.0.mlp.up_proj.weight": ("layers/mlp/up_proj/kernel", 0, True),
        "model.layers.1.mlp.up_proj.weight": ("layers/mlp/up_proj/kernel", 1, True),
        "model.norm.weight": ("norm/scale", None, False),
    }


@pytest.mark.parametrize(("call", "message"), [
    (lambda: names.hf_module("layers/self_attn/q_pro", 0), r"did you mean layers/self_attn/q_proj"),
    (lambda: names.hf_module("layers/mlp/up_proj"), "needs a layer number"),
    (lambda: names.hf_module("norm", 0), "has no layer number"),
    (lambda: names.our_module("model.layers.0.mlp.up"), "is no module of this model family"),
    (lambda: names.hf_tensor("layers/mlp/up_proj/lora_a", 0), "no plain weight"),
])
def test_unknown_names(call, message):
    with pytest.raises(PeftJaxError, match=message):
        call()
