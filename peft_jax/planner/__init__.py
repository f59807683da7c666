"""What a training step needs of a device's memory, said before there is a weight: a compiled program, its parts, and
the source article's rules of thumb; which devices hold it; which method to take."""

from peft_jax.planner.hardware import DEVICES, Device, Suggestion, suggest_hardware
from peft_jax.planner.parts import Part, sum_of_parts
from peft_jax.planner.program import Memory, compile_step
from peft_jax.planner.rule import Rule, adapter_rule, rule_of_thumb
from peft_jax.planner.shapes import Shapes, shapes
from peft_jax.planner.target import Target, h100
from peft_jax.planner.verdict import Plan, describe

__all__ = ["DEVICES", "Device", "Memory", "Part", "Plan", "Rule", "Shapes", "Suggestion", "Target", "adapter_rule",
           "compile_step", "describe", "h100", "rule_of_thumb", "shapes", "suggest_hardware", "sum_of_parts"]
