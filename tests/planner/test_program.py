"""What is read from a compiled program, and a device that need not be there."""

import jax
import jax.numpy as jnp
import pytest

from peft_jax import quantize
from peft_jax.planner import Device, Memory, Part, Plan, h100
from peft_jax.planner.program import Program, whole_copies
from peft_jax.planner.verdict import DEVICES, ESTIMATE, describe

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
    return Plan({"rows": 1}, program, parts)


@pytest.mark.parametrize("need, fits", [(78 * 10**9, (True, True)), (78 * 10**9 + 1, (False, True)),
                                        (80 * 2**30 - 2 * 10**9 + 1, (False, False))])
def test_the_margin_is_kept_and_both_readings_of_80_gb_are_told_apart(need, fits):
    plan = planned(need)
    assert tuple(plan.fits(device) for device in DEVICES) == fits
    assert [("does not fit" not in line) for line in describe(plan).splitlines()[-2:]] == list(fits)
    assert not plan.fits(Device("none", 0))


def test_only_what_counts_is_summed_and_only_a_cpu_in_place_of_a_device_is_an_estimate():
    assert planned(100).sum == 7
    assert ESTIMATE in describe(planned(100)) and ESTIMATE not in describe(planned(100, estimate=False))


def test_without_the_plugin_there_is_no_other_device():
    try:
        import jax_plugins.xla_cuda12  # noqa: F401
    except ImportError:
        assert h100() is None
    else:
        assert "H100" in h100().name
