"""The sum of parts against the compiled step, on a tiny model in float32, where a CPU computes as it is told."""

import jax
import optax
import pytest
from flax import linen as nn

from peft_jax import chain, full, houlsby, lora, make_mesh, plan, quantize
from peft_jax.errors import PeftJaxError
from peft_jax.models import CausalLM, EncoderConfig, Head, LlamaConfig
from peft_jax.planner import Target, shapes, sum_of_parts
from peft_jax.planner.shapes import as_model
from peft_jax.train.loss import cross_entropy

METHODS = {"lora": lora(r=4), "houlsby": houlsby(),
           "qlora": chain(quantize(double_quant=True), lora(r=4, target_modules="all-linear"))}
GIVEN = ("quantised weights", "other frozen weights", "trained parameters")
TARGET = Target("a device", None, {})


# Measured: temporaries 0.99 to 1.11 of the compiled ones over these methods with and without remat; nothing is fused in
# the parts, and the compiler orders as it likes.
@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_arguments_are_exact_and_the_sum_is_within_15_percent(tiny_model, name):
    found = plan(METHODS[name], tiny_model[0].clone(remat=name == "qlora"), optax.adamw(1e-4), batch=2, seq=64)
    memory, parts = found.program.memory, {part.name: part.bytes for part in found.parts}
    assert sum(parts.get(part, 0) for part in (*GIVEN, "optimiser state", "batch")) == memory.arguments
    assert found.sum == pytest.approx(memory.total, rel=0.15)
    assert ("quantised weights" in parts) == (name == "qlora") and not found.program.copies


# Measured: 0.83 of the compiled total on this model, where small values that no part stands for weigh much;
# docs/plan.md has larger ones. On tensor the parts do not know what of the activations is cut, and say so.
@pytest.mark.slow
@pytest.mark.parametrize("name, sizes, low, high", [
    ("full", (1, 4, 1), 0.8, 1.1), ("lora", (2, 1, 1), 0.8, 1.1), ("qlora", (1, 2, 2), 1, 2)])
def test_on_a_mesh_arguments_are_those_of_a_device_as_it_holds_them(tiny_model, name, sizes, low, high):
    mesh = make_mesh(*sizes, devices=jax.devices()[:4])
    found = plan((METHODS | {"full": full()})[name], tiny_model[0], optax.adamw(1e-4), 4, 64, mesh, True)
    parts = {part.name: part for part in found.parts}
    held = sum(part.bytes for part in found.parts if part.name in (*GIVEN, "optimiser state", "batch"))
    assert held == pytest.approx(found.program.memory.arguments, abs=64)
    assert low < found.sum / found.program.memory.total < high
    assert ("weights gathered" in parts) == (sizes[1] > 1)
    assert ("upper bound" in parts["activations kept"].recipe) == (sizes[2] > 1)


@pytest.mark.slow
def test_a_config_gives_the_plan_of_its_model(tiny_model):
    model = tiny_model[0]
    found = plan(METHODS["lora"], model.config, optax.adamw(1e-4), 2, 32, None, True, dtype="bfloat16")
    given = shapes(CausalLM(model.config, "bfloat16", remat=True), METHODS["lora"], optax.adamw(1e-4), 2, 32)
    assert found.parts == sum_of_parts(given, 512, cross_entropy)
    assert found.assumed["remat"] and found.assumed["computing in"] == "bfloat16"
    assert sum(found.groups.values()) == found.sum


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, words", [
    (optax.adamw(1e-4), "8.0 bytes for each trained parameter: two moments (Adam) in float32"),
    (optax.adamw(1e-4, mu_dtype="bfloat16"), "6.0 bytes for each trained parameter: two moments (Adam) in bfloat16, "),
    (optax.sgd(1e-4), "keeps nothing"), (optax.sgd(1e-4, momentum=0.9), "4.0 bytes for each trained parameter: one"),
    (optax.lion(1e-4), "one moment (Lion)"), (optax.adagrad(1e-4), "whatever this optimiser keeps")])
def test_the_optimiser_behind_its_bytes_is_named(tiny_model, optimizer, words):
    parts = sum_of_parts(shapes(tiny_model[0], METHODS["lora"], optimizer, 1, 32), 512, cross_entropy)
    assert words in next(part.recipe for part in parts if part.group == "optimiser")


@pytest.mark.parametrize("model", ["llama3_8b", {"hidden_size": 3}, None, LlamaConfig])
def test_what_is_no_model_is_said(model):
    with pytest.raises(PeftJaxError, match="neither a model nor a model's config"):
        plan(METHODS["lora"], model, optax.adamw(1e-4))


@pytest.mark.parametrize("change, words", [
    ({"method": "lora"}, "method is a str: give one such as lora"),
    ({"optimizer": "adamw"}, "optimizer is a str: give one such as optax.adamw"),
    ({"mesh": "8"}, "mesh is a str"), ({"target": "h100"}, "target is a str"), ({"remat": "no"}, "remat='no'"),
    ({"dtype": "float33"}, "no floating-point type"), ({"param_dtype": "int8"}, "no floating-point type"),
    ({"answers": 100}, "answers=100 of a row of 16 tokens")])
def test_what_is_of_another_kind_is_said(tiny_model, change, words):
    with pytest.raises(PeftJaxError, match=words):
        plan(**({"model": tiny_model[0], "method": lora(), "optimizer": optax.adamw(1e-4), "seq": 16} | change))


class Other(nn.Module):
    """A model of one's own, without a field to set."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_a_model_of_ones_own_lacks_is_said(dtype):
    with pytest.raises(PeftJaxError, match="no method 'hidden'"):
        plan(METHODS["lora"], Other(), optax.adamw(1e-4), dtype=dtype)


@pytest.mark.parametrize("head, seq, answers", [(Head("SEQ_CLS", 3), 16, 1), (Head("TOKEN_CLS", 3), 16, 15),
                                                (Head("SEQ_CLS", 3), 1, 1)])
def test_a_classifier_of_texts_learns_one_answer_a_row(head, seq, answers):
    sizes = EncoderConfig(64, 32, 48, 2, 4, 64, head=head)
    given = shapes(as_model(sizes), lora(target_modules=("query",)), optax.adamw(1e-4), 2, seq)
    assert given.batch["loss_index"].shape == (1, 2, answers)


def test_a_target_is_one_device(tiny_model):
    with pytest.raises(PeftJaxError, match="target is one device"):
        plan(METHODS["lora"], tiny_model[0], optax.adamw(1e-4), mesh=make_mesh(), target=TARGET)
