"""The rules of thumb of "Full Fine-Tuning vs PEFT", the article that this project puts to the test.

They are shown beside what a plan finds. The article's GB are 1024**3 bytes.

Full fine-tuning takes so many bytes for each parameter, activations included whatever the batch: 14 in bfloat16 with
AdamW. For 1, 3, 7, 13 and 70 billion parameters the article prints 13.1, 39.2, 91.5, 170.1 and 915.5 GB; its formula
gives what stands here:

>>> [round(rule_of_thumb(billions * 10**9).bytes / GIB, 1) for billions in (1, 3, 7, 13, 70)]
[13.0, 39.1, 91.3, 169.5, 912.7]
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from peft_jax import quant
from peft_jax.core import tree
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.planner.breakdown import state_types
from peft_jax.planner.shapes import Shapes

GIB = 1024**3
# Bytes for each parameter of full fine-tuning, by precision and optimiser.
BYTES = {("bf16", "adamw"): 14, ("fp32", "adamw"): 20, ("bf16", "sgd"): 8}
FALLBACK = 14
CALLED = {"bfloat16": "bf16", "float32": "fp32"}  # numpy's name for a precision: the article's
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

    ``precision`` is "bf16" or "fp32", or numpy's name of either, ``optimizer`` "adamw" or "sgd"; for a pair that the
    article does not have its own fallback holds, 14 bytes, and the recipe says so. Batch, length, rematerialisation and
    the model's shape have no place in it. Raises ``PeftJaxError`` for ``parameters`` that are no number of at least 1.
    """
    _check(parameters)
    precision = CALLED.get(precision, precision)
    pair = (precision, optimizer)
    each = BYTES.get(pair, FALLBACK)
    words = RECIPES.get(pair, f"the article's fallback: it has no {precision} with {optimizer}")
    return Rule("full fine-tuning", round(each * parameters),
                f"{each} bytes for each of {parameters:,.0f} parameters: {words}")


def _check(parameters) -> None:
    number = isinstance(parameters, int | float) and not isinstance(parameters, bool)
    if not number or not 1 <= parameters < math.inf:
        raise PeftJaxError(f"rule of thumb: parameters={parameters!r}: give how many the model has, such as 7e9.")


def adapter_rule(parameters: int, kind: str) -> Rule:
    """What the article says of "lora" or "qlora" on a base of so many parameters, whatever the adapter.

    >>> round(adapter_rule(7 * 10**9, "qlora").bytes / GIB, 3)
    6.2
    """
    _check(parameters)
    if kind not in ADAPTERS:
        raise PeftJaxError(f"rule of thumb: kind={kind!r}: {nearest(str(kind), ADAPTERS)}")
    each, more = ADAPTERS[kind]
    name = {"lora": "LoRA", "qlora": "QLoRA"}[kind]
    return Rule(name, round((each * parameters / 1e9 + more) * GIB),
                f"{each} GB for each billion parameters and {more:.0f} more, of 1024**3 bytes")


def rules(shapes: Shapes) -> tuple[Rule, ...]:
    """What the article would say of a step: that of full fine-tuning always, and its own for a LoRA or QLoRA."""
    precision = jnp.dtype(shapes.model.param_dtype).name if hasattr(shapes.model, "param_dtype") else "float32"
    keeps = any(leaf.ndim for leaf in jax.tree.leaves(shapes.opt_state))
    adam = "ScaleByAdamState" in state_types(shapes.opt_state)
    optimizer = "adamw" if adam else "another optimiser" if keeps else "sgd"
    found = [rule_of_thumb(shapes.parameters, precision, optimizer)]
    if "LORA" in [part.config["peft_type"] for part in shapes.method.parts or (shapes.method,)]:
        packed = any(map(quant.is_leaf, tree.flatten(shapes.frozen).values()))
        found.append(adapter_rule(shapes.parameters, "qlora" if packed else "lora"))
    return tuple(found)


RANKS = {"simple": 8, "moderate": 16, "complex": 32}  # of LoRA, by the task's complexity
COMPLEXITIES = tuple(RANKS)


def article_method(parameters: int, memory: int, tasks: int, complexity: str) -> dict:
    """What the article's code would recommend with so many bytes of memory in all: the first of these that holds.

    LoRA where its rule fits; QLoRA where that fits and the model has more than 7 billion parameters; adapters where
    several tasks share a base; else "none". Of its three examples the first two follow; for the third, several tasks
    on one base, the article prints adapters, but LoRA fits there, so its code stops at LoRA. The rules count no
    activations, and below 7 billion parameters QLoRA is never said, however little memory there is.

    >>> cases = ((7, 24, 1), (70, 80, 1), (7, 24, 5), (7, 8, 5), (7, 8, 1))  # billions, GB, tasks
    >>> [article_method(b * 10**9, gb * GIB, tasks, "moderate")["choice"] for b, gb, tasks in cases]
    ['lora', 'qlora', 'lora', 'adapters', 'none']
    """
    needs = {kind: adapter_rule(parameters, kind).bytes for kind in ADAPTERS}
    if needs["lora"] <= memory:
        choice, words = "lora", f"LoRA with rank {RANKS[complexity]}"
    elif needs["qlora"] <= memory and parameters > 7 * 10**9:
        choice, words = "qlora", f"QLoRA with rank {RANKS[complexity]}"
    elif tasks > 1:
        choice, words = "adapters", "adapter layers, for several tasks share a base"
    else:
        choice, words = "none", "no method"
    return {"choice": choice, "words": words, "needs": needs, "memory": memory}
