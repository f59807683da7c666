import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.hub import families
from peft_jax.hub.families import hf_names
from peft_jax.hub.families.llama import MODULES


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: next(iter(family.kinds)))
def test_modules_go_there_and_back(family):
    for table in (family.modules, hf_names.without_prefix(family.modules, family.prefix)):
        for path in table:
            layer = 11 if hf_names.is_stacked(table, path) else None
            assert hf_names.our_module(table, hf_names.hf_module(table, path, layer)) == (path, layer)


def test_tensors_of_each_layer():
    places = hf_names.tensors(MODULES, ["layers/self_attn/q_proj/bias", "layers/mlp/up_proj/kernel", "norm/scale"], 2)
    assert places == {
        "model.layers.0.self_attn.q_proj.bias": ("layers/self_attn/q_proj/bias", 0, False),
        "model.layers.1.self_attn.q_proj.bias": ("layers/self_attn/q_proj/bias", 1, False),
        "model.layers.0.mlp.up_proj.weight": ("layers/mlp/up_proj/kernel", 0, True),
        "model.layers.1.mlp.up_proj.weight": ("layers/mlp/up_proj/kernel", 1, True),
        "model.norm.weight": ("norm/scale", None, False),
    }


@pytest.mark.parametrize(("call", "message"), [
    (lambda: hf_names.hf_module(MODULES, "layers/self_attn/q_pro", 0), r"did you mean layers/self_attn/q_proj"),
    (lambda: hf_names.hf_module(MODULES, "layers/mlp/up_proj"), "needs a layer number"),
    (lambda: hf_names.hf_module(MODULES, "norm", 0), "has no layer number"),
    (lambda: hf_names.our_module(MODULES, "model.layers.0.mlp.up"), "is no module of this model family"),
    (lambda: hf_names.place(MODULES, "layers/mlp/up_proj/lora_a", 0), "no plain weight"),
])
def test_unknown_names(call, message):
    with pytest.raises(PeftJaxError, match=message):
        call()
