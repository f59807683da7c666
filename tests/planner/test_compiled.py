"""What is read from a compiled program, and a device that need not be there."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from peft_jax import lora, prefix, quantize
from peft_jax.planner import Device, Memory, Part, Plan, Target, h100, shapes, sum_of_parts, tpu
from peft_jax.planner.compiled import Program, whole_copies
from peft_jax.planner.plan_result import ESTIMATE, describe
from peft_jax.planner.shapes import abstract, as_model, attending, batch_shapes
from peft_jax.train.loss import cross_entropy

KERNEL = {"layers": {"up_proj": {"kernel": jax.ShapeDtypeStruct((3, 64, 8), jnp.bfloat16)}}}


def test_outputs_in_the_place_of_arguments_count_once():
    assert Memory(arguments=100, outputs=30, aliases=20, temporaries=7).total == 117


@pytest.mark.parametrize("text, found", [
    ("ENTRY %main (p: bf16[3,64,8]) -> f32[] {\n  %copy = f32[3,64,8]{2,1,0} convert(%p)\n}", 3 * 64 * 8 * 4),
    ("%inner (p: bf16[3,64,8]) -> f32[] {\n  %c = f32[3,64,8]{2,1,0} convert(%p)\n}\n\n"
     "ENTRY %main (p: bf16[3,64,8]) -> f32[] {\n  %f = f32[] fusion(%p), kind=kLoop, calls=%inner\n}", 0),
    ("ENTRY %main (p: bf16[3,64,8]) -> f32[] {\n  %one = f32[64,8]{1,0} convert(%slice)\n}", 0)])
def test_a_copy_of_all_layers_is_found_and_one_layer_or_the_inside_of_a_fusion_is_none(text, found):
    assert sum(whole_copies(text, KERNEL).values()) == found


def test_every_layer_decoded_at_once_is_found_unless_another_array_has_that_shape():
    packed = jax.eval_shape(lambda params: quantize().init(None, params), KERNEL)
    text = "ENTRY %main () -> f32[] {\n  %all = bf16[3,8,64]{2,1,0} fusion(%codes)\n}"
    assert whole_copies(text, packed) == {"layers/up_proj/kernel": 3 * 64 * 8 * 2}
    assert not whole_copies(text, packed, jax.ShapeDtypeStruct((3, 8, 64), jnp.bfloat16))


def planned(need, estimate=True):
    program = Program(Memory(need - 10, 0, 0, 10), "cpu", estimate, {})
    parts = [Part("weights", 7, "all", "weights"), Part("inside", 5, "of them", "weights", False)]
    return Plan({"rows": 1}, program, parts, ())


@pytest.mark.parametrize("need, fits", [(78 * 10**9, True), (78 * 10**9 + 1, False)])
def test_the_margin_is_kept(need, fits):
    assert planned(need).fits(Device("80 GB", 80 * 10**9)) == fits and not planned(need).fits(Device("none", 0))


def test_only_what_counts_is_summed_and_only_a_cpu_in_place_of_a_device_is_an_estimate():
    assert planned(100).sum == 7
    assert ESTIMATE in describe(planned(100)) and ESTIMATE not in describe(planned(100, estimate=False))


def test_without_the_plugin_there_is_no_other_device():
    if any(importlib.util.find_spec(f"jax_cuda{number}_plugin") for number in (12, 13)):
        assert "H100" in h100().name
    else:
        assert h100() is None
    if importlib.util.find_spec("libtpu") is None:
        assert tpu() is None


class Absent:
    """Where a program's arguments would lie: on one device that is not there."""

    def __init__(self, **device):
        self.device_set = {type("Device", (), device)()}


@pytest.mark.slow
@pytest.mark.parametrize("change, method, chosen", [
    ({}, lora(), "cudnn"), ({"compute_capability": "7.5"}, lora(), "xla"), ({"platform": "tpu"}, lora(), "xla"),
    ({"dtype": "float32"}, lora(), "xla"), ({"seq": 31}, lora(), "xla"), ({}, prefix(4), "cudnn"),
    ({}, prefix(5), "xla"), ({"asked": "xla"}, lora(), "xla"), ({"seq": 31, "packed": False}, lora(), "cudnn"),
    ({"packed": False}, prefix(5), "cudnn"), ({"platform": "tpu", "seq": 256}, lora(), "splash"),
    ({"platform": "tpu", "seq": 256, "packed": False}, prefix(5), "xla")])
def test_the_target_chooses_the_attention_that_is_left_to_the_device(tiny_model, change, method, chosen):
    given = {"platform": "gpu", "compute_capability": "9.0", "dtype": "bfloat16", "seq": 32, "asked": "auto",
             "packed": True, **change}
    target = Target("a GPU", Absent(platform=given["platform"], compute_capability=given["compute_capability"]), {})
    model = as_model(dataclasses.replace(tiny_model[0].config, attn_implementation=given["asked"]), given["dtype"])
    params = jax.eval_shape(method.init, jax.random.key(0), abstract(model))
    found = attending(model, method, params, batch_shapes(2, given["seq"], 1, packed=given["packed"]), target)
    assert found.config.attn_implementation == chosen


def test_without_another_target_the_choice_is_left_as_it_is(tiny_model):
    assert shapes(tiny_model[0], lora(), optax.adamw(1e-4), 2, 31).model == tiny_model[0]


@pytest.mark.slow
@pytest.mark.parametrize("platform, implementation, packed, squares", [
    ("gpu", "auto", False, False), ("gpu", "xla", False, True), ("tpu", "auto", False, False),
    ("tpu", "auto", True, False), ("tpu", "xla", True, True)])
def test_a_plan_has_a_square_where_the_target_s_attention_has_one(platform, implementation, packed, squares, tiny_model,
                                                                  monkeypatch):
    """Twice the tokens, four times the scores: a layer of rows this long is all attention."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # of a library not here
    target = Target("a device", Absent(platform=platform, compute_capability="9.0"), {})
    sizes = dataclasses.replace(tiny_model[0].config, attn_implementation=implementation, max_position_embeddings=4096)

    def layer(seq):
        given = shapes(as_model(sizes, "bfloat16", "bfloat16", True), lora(), optax.adamw(1e-4), 1, seq, target=target,
                       packed=packed, answers=4)
        return next(part.bytes for part in sum_of_parts(given, 4, cross_entropy) if part.name.startswith("one layer"))

    assert (layer(4096) / layer(2048) > 3.5) == squares and (squares or layer(4096) / layer(2048) < 2.2)
