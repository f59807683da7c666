"""Bytes that a traced program needs, before a compiler has seen it: what a backward pass keeps, what lives at once.

All of it works on shapes. Nothing is fused here, so an intermediate result counts even where a compiler would never
write it to memory; and equations run in the order they were traced in, as no scheduler changed it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from peft_jax import tree


def kept(function: Callable, wrt: Any, *rest: Any) -> int:
    """Bytes that differentiating ``function(wrt, *rest)`` by ``wrt`` keeps for the backward pass, arguments left out.

    ``jax.checkpoint`` in it, and what its policy keeps, is respected.

    >>> kept(lambda x: jnp.sin(jnp.sin(x)).sum(), jax.ShapeDtypeStruct((8,), jnp.float32))  # two cosines
    64
    """
    def residuals(wrt, *rest):
        return jax.tree.leaves(jax.vjp(lambda wrt: function(wrt, *rest), wrt)[1])

    traced = jax.make_jaxpr(residuals)(wrt, *rest).jaxpr
    made = {one for one in traced.outvars if not isinstance(one, Literal)} - {*traced.invars, *traced.constvars}
    return sum(tree.nbytes(one.aval) for one in made)


def loops(function: Callable, *args: Any) -> list[int]:
    """For each ``scan`` in ``function(*args)``, the most bytes alive at once inside one turn, beyond what it is given.

    >>> loops(lambda xs: jax.lax.scan(lambda c, x: (c + jnp.sin(x).sum(), None), 0.0, xs)[0], jnp.zeros((3, 100)))
    [404]
    """
    traced = jax.make_jaxpr(function)(*args).jaxpr
    return list(_loops(dce_jaxpr(traced, [True] * len(traced.outvars))[0]))


def _loops(jaxpr) -> Iterator[int]:
    for equation in jaxpr.eqns:
        for one in inside(equation):
            if equation.primitive.name == "scan":
                yield peak(one)
            else:
                yield from _loops(one)


def inside(equation) -> Iterator[Jaxpr]:
    """The programs within an equation: bodies of loops, branches, called functions."""
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


# Other views of what is there already: a compiler reads through them instead of writing them to memory.
VIEWS = ("broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose")


def peak(jaxpr: Jaxpr) -> int:
    """The most bytes alive at once, beyond the arguments: what an equation makes lives until its last use."""
    roots = _roots(jaxpr)
    last = {roots[one]: at for at, equation in enumerate(jaxpr.eqns) for one in _read(equation.invars)}
    last |= dict.fromkeys([roots[one] for one in _read(jaxpr.outvars)], len(jaxpr.eqns))
    given = {*jaxpr.invars, *jaxpr.constvars}
    alive = most = 0
    for at, equation in enumerate(jaxpr.eqns):
        made = {one for one in equation.outvars if roots.get(one) is one}
        most = max(most, alive + max([_sum(made), *map(peak, inside(equation))]))
        ends = {roots[one] for one in _read(equation.invars) if last[roots[one]] == at}
        alive += _sum(made & last.keys()) - _sum(ends - given)
    return most


def _roots(jaxpr) -> dict:
    """Each variable, and the one that it is a view of: itself for most."""
    roots = {one: one for one in (*jaxpr.invars, *jaxpr.constvars)}
    for equation in jaxpr.eqns:
        seen = [one for one in equation.invars if not isinstance(one, Literal)]
        view = equation.primitive.name in VIEWS and len(seen) == 1
        roots |= {one: roots[seen[0]] if view else one for one in equation.outvars}
    return roots


def _sum(variables) -> int:
    return sum(tree.nbytes(one.aval) for one in variables)


def _read(variables) -> set:
    return {one for one in variables if not isinstance(one, Literal)}
