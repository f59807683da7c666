"""What a training step needs of a device's memory, said before there is a weight: a compiled program, and its parts."""

from peft_jax.planner.parts import Part, sum_of_parts
from peft_jax.planner.program import Memory, compile_step
from peft_jax.planner.shapes import Shapes, shapes
from peft_jax.planner.target import Target, h100
from peft_jax.planner.verdict import Device, Plan, describe

__all__ = ["Device", "Memory", "Part", "Plan", "Shapes", "Target", "compile_step", "describe", "h100",
           "shapes", "sum_of_parts"]
