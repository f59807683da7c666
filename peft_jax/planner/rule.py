"""The source article's rules of thumb, as it gives them, shown beside what a plan finds. Its GB are 1024**3 bytes.

Full fine-tuning takes so many bytes for each parameter, activations included whatever the batch: 14 in bfloat16 with
AdamW. For 1, 3, 7, 13 and 70 billion parameters the article prints 13.1, 39.2, 91.5, 170.1 and 915.5 GB; its formula
gives what stands here:

>>> [round(rule_of_thumb(billions * 10**9).bytes / GIB, 1) for billions in (1, 3, 7, 13, 70)]
[13.0, 39.1, 91.3, 169.5, 912.7]
"""

from typing import NamedTuple

import jax.numpy as jnp

from peft_jax import quant, tree
from peft_jax.planner.parts import KEEPS, state_types
from peft_jax.planner.shapes import Shapes

GIB = 1024**3
# Bytes for each parameter of full fine-tuning, by precision and optimiser.
BYTES = {("bf16", "adamw"): 14, ("fp32", "adamw"): 20, ("bf16", "sgd"): 8}
FALLBACK = 14
RECIPES = {("bf16", "adamw"): "weights 2, gradients 2, two moments in float32 8, activations 2",
           ("fp32", "adamw"): "AdamW on float32 weights; the article does not split it",
           ("bf16", "sgd"): "SGD on bfloat16 weights; the article does not split it"}
# GB for each billion parameters of the base, and GB on top, when an adapter trains.
ADAPTERS = {"lora": (2.0, 2.0), "qlora": (0.6, 2.0)}


class Rule(NamedTuple):
    """name, bytes of all devices together, and what the rule assumes."""

    name: str
    bytes: int
    recipe: str


def rule_of_thumb(parameters: int, precision: str = "bf16", optimizer: str = "adamw") -> Rule:
    """What full fine-tuning of so many parameters needs by the article's rule.

    ``precision`` is "bf16" or "fp32", ``optimizer`` "adamw" or "sgd"; for a pair that the article does not have its own
    fallback holds, 14 bytes, and the recipe says so. Batch, length, rematerialisation and the model's shape have no
    place in it.
    """
    pair = (precision, optimizer)
    each = BYTES.get(pair, FALLBACK)
    words = RECIPES.get(pair, f"the article's fallback: it has no {precision} with {optimizer}")
    return Rule("full fine-tuning", each * parameters, f"{each} bytes for each of {parameters:,} parameters: {words}")


def adapter_rule(parameters: int, kind: str) -> Rule:
    """What the article says of "lora" or "qlora" on a base of so many parameters, whatever the adapter.

    >>> round(adapter_rule(7 * 10**9, "qlora").bytes / GIB, 3)
    6.2
    """
    each, more = ADAPTERS[kind]
    name = {"lora": "LoRA", "qlora": "QLoRA"}[kind]
    return Rule(name, round((each * parameters / 1e9 + more) * GIB),
                f"{each} GB for each billion parameters and {more:.0f} more")


def rules(shapes: Shapes) -> tuple[Rule, ...]:
    """What the article would say of a step: that of full fine-tuning always, and its own for a LoRA or QLoRA."""
    names = {"bfloat16": "bf16", "float32": "fp32"}
    precision = jnp.dtype(shapes.model.param_dtype).name if hasattr(shapes.model, "param_dtype") else "float32"
    kept = state_types(shapes.opt_state)
    optimizer = "adamw" if "ScaleByAdamState" in kept else "sgd" if not {*kept} & {*KEEPS} else "another optimiser"
    found = [rule_of_thumb(shapes.parameters, names.get(precision, precision), optimizer)]
    if "LORA" in [part.config["peft_type"] for part in shapes.method.parts or (shapes.method,)]:
        packed = any(map(quant.is_leaf, tree.flatten(shapes.frozen).values()))
        found.append(adapter_rule(shapes.parameters, "qlora" if packed else "lora"))
    return tuple(found)
