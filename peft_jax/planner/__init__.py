"""What a training step needs of a device's memory, said before there is a weight: a compiled program, its parts, and
the rules of thumb of the article "Full Fine-Tuning vs PEFT"; which devices hold it; which method to take."""

from peft_jax.planner.breakdown import Part, sum_of_parts
from peft_jax.planner.compiled import Memory, compile_step
from peft_jax.planner.hardware import DEVICES, Device, Suggestion, suggest_hardware
from peft_jax.planner.plan_result import Plan, describe
from peft_jax.planner.rule_of_thumb import Rule, adapter_rule, rule_of_thumb
from peft_jax.planner.shapes import Shapes, shapes
from peft_jax.planner.target_device import Target, h100, tpu

__all__ = ["DEVICES", "Device", "Memory", "Part", "Plan", "Rule", "Shapes", "Suggestion", "Target", "adapter_rule",
           "compile_step", "describe", "h100", "rule_of_thumb", "shapes", "suggest_hardware", "sum_of_parts", "tpu"]
