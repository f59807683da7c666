"""Floating-point operations of a traced program: its products of matrices, with loops counted as often as they turn.

A compiled program's own ``cost_analysis`` counts the body of a loop once (DESIGN.md), so all layers of a scan as one.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from peft_jax.planner.liveness import inside


def flops(function: Callable, *args: Any) -> int:
    """Of all products of matrices in ``function(*args)``, of arrays or shapes: two for each multiply and add.

    What a rematerialised layer computes again is counted again. A ``while`` counts once, a ``cond`` as its dearest
    branch.

    >>> x = jax.ShapeDtypeStruct((4, 4), "float32")
    >>> flops(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=3)[0], x)
    384
    """
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
            continue
        found = [_flops(one) for one in inside(equation)]
        if equation.primitive.name == "cond":
            total += max(found, default=0)
        else:
            total += sum(found) * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total


def _product(equation) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
