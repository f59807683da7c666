"""Bytes that a traced program needs, before a compiler has seen it: what a backward pass keeps, what lives at once.

All of it works on shapes, and on what every backend's compiler does, see :func:`peak`: nothing here is measured.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from peft_jax.core import tree
from peft_jax.core._compat import ClosedJaxpr, Jaxpr, Literal, dce_jaxpr, scan_counts


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


def loops(function: Callable, *args: Any, adds: bool = False) -> list[tuple[int, int]]:
    """For each ``scan`` in ``function(*args)``: bytes that wait meanwhile, and the most alive inside one turn.

    What waits is neither an argument nor a result of ``function``, nor what the loop hands on from turn to turn: that
    is inside. ``adds``: as of :func:`peak`.

    >>> xs = jnp.zeros((3, 100))  # sines are summed as they are made, a running sum has to be there whole
    >>> loops(lambda xs: jax.lax.scan(lambda c, x: (c + jnp.sin(x).sum(), None), 0.0, xs)[0], xs)
    [(0, 8)]
    >>> loops(lambda xs: jax.lax.scan(lambda c, x: (c + jnp.cumsum(x)[0], None), 0.0, xs)[0], xs)[0][1] > 400
    True
    """
    traced = jax.make_jaxpr(function)(*args).jaxpr
    return _loops(dce_jaxpr(traced, [True] * len(traced.outvars))[0], adds)


def _loops(jaxpr: Jaxpr, adds: bool) -> list[tuple[int, int]]:
    _, flat, results = _flattened(jaxpr)
    sources = _sources(flat, results, adds)
    last, found = _last(flat, sources, ()), []
    told = {source for value in results for source in sources.get(value, ())}
    for at, one in enumerate(flat):
        for body, *turn in one.inside:
            same, carried = turn or (0, 0)
            on = {source for value in one.reads[same:same + carried] for source in sources[value] if last[source] == at}
            there = {*one.makes[carried:], *(value for earlier in flat[:at] for value in earlier.makes)}
            waits = sum(value.bytes for value in there - on - told
                        if sources[value] == {value} and last.get(value, -1) >= at)
            found += ([(waits, peak(body, same, carried, adds))] if turn else
                      [(waits + more, most) for more, most in _loops(body, adds)])
    return found


KERNELS = {"pallas_call", "core_map", "mpmd_map"}  # Pallas' own


def inside(equation) -> Iterator[Jaxpr]:
    """The programs within an equation: bodies of loops, branches, called functions; not a kernel's, which computes in
    a memory of its own."""
    if equation.primitive.name in KERNELS:
        return
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value


# Other views of what is there already: a compiler reads through them instead of writing them to memory.
VIEWS = {"broadcast_in_dim", "copy", "expand_dims", "reshape", "squeeze", "stop_gradient", "transpose", "name",
         "optimization_barrier"}
# Computed value by value, so a compiler may compute them inside what reads them; DEAR ones not twice.
DEAR = {"div", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt", "sqrt", "tanh", "sin", "cos",
        "cbrt", "erf_inv"}
CHEAP = {"abs", "add", "add_any", "and", "clamp", "convert_element_type", "eq", "floor", "ge", "gt", "integer_pow",
         "is_finite", "le", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "round", "select_n", "sign", "square",
         "sub", "xor", "rem", "iota", "slice"}
ADDS = {"add", "add_any"}
SUMS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"}
CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
         "custom_vjp_call", "custom_vjp_call_jaxpr"}


class Value:
    """One result of one equation, wherever functions hand it on; equal to itself alone."""

    def __init__(self, variable):
        self.bytes = tree.nbytes(variable.aval)


class Flat(NamedTuple):
    """An equation with called functions written out: what is left inside are the bodies of loops and branches."""

    kind: str
    reads: list[Value]
    makes: list[Value]
    inside: list[tuple]  # of arguments of :func:`peak`


def written_out(jaxpr: Jaxpr, known: dict) -> Iterator[Flat]:
    """The equations of ``jaxpr``; ``known`` are the values of its arguments, and gets those of all its variables."""
    for equation in jaxpr.eqns:
        reads = [known[one] for one in equation.invars if not isinstance(one, Literal)]
        bodies = list(inside(equation))
        if equation.primitive.name in CALLS and len(bodies) == 1:
            (body,), given = bodies, equation.invars[-len(bodies[0].invars):] if bodies[0].invars else []
            local = {own: Value(own) if isinstance(one, Literal) else known[one]
                     for own, one in zip(body.invars, given, strict=True)}
            local |= {one: Value(one) for one in body.constvars}
            yield from written_out(body, local)
            known |= {outer: Value(outer) if isinstance(inner, Literal) else local[inner]
                      for outer, inner in zip(equation.outvars, body.outvars, strict=True)}
        else:
            known |= {one: Value(one) for one in equation.outvars}
            yield Flat(equation.primitive.name, reads, [known[one] for one in equation.outvars],
                       [(body, *_turn(equation)) for body in bodies])


def _flattened(jaxpr: Jaxpr) -> tuple[dict, list[Flat], list[Value]]:
    """(the values of all variables, the equations, the values of the results)."""
    known = {one: Value(one) for one in (*jaxpr.invars, *jaxpr.constvars)}
    flat = list(written_out(jaxpr, known))
    return known, flat, [known[one] for one in jaxpr.outvars if not isinstance(one, Literal)]


def _turn(equation) -> tuple[int, ...]:
    """Of a scan, how many arguments of its body are the same in every turn, and how many it hands on."""
    return scan_counts(equation.params) if equation.primitive.name == "scan" else ()


def peak(jaxpr: Jaxpr, same: int | None = None, carried: int = 0, adds: bool = False) -> int:
    """The most bytes alive at once, beyond the arguments, where each result lives until its last use.

    Of the body of a scan the first ``same`` arguments are given in every turn, the next ``carried`` ones are the last
    turn's results, and count, and the others are cut out of a stack when they are first read.
    As a compiler would do it, views are not written to memory, nor is what is computed value by value and read by
    nothing else than more of that and sums, and such a result may take the place of what it is the last to read. In
    what order equations run is a compiler's to choose; here they keep the order that they were traced in.
    ``adds``: a product is added to what is there as it is made, as GPUs' libraries can (the beta of a GEMM); elsewhere
    both terms of such a sum are written, and added where it is read.
    """
    known, flat, kept = _flattened(jaxpr)
    if same is not None:
        arguments = [known[one] for one in jaxpr.invars]
        first = Flat("carry", [], arguments[same:same + carried], [])
        flat = [first, *_cut_out(flat, set(arguments[same + carried:]))]
    given = {known[one] for one in (*jaxpr.invars, *jaxpr.constvars)} - {made for one in flat for made in one.makes}
    return _most(flat, _sources(flat, kept, adds), given, kept, adds)


def _cut_out(flat: list[Flat], slices: set[Value]) -> Iterator[Flat]:
    for one in flat:
        for value in dict.fromkeys(one.reads):
            if value in slices:
                slices.remove(value)
                yield Flat("slice", [], [value], [])
        yield one


def _sources(flat: list[Flat], kept: list[Value], adds: bool) -> dict[Value, frozenset]:
    """Each value, and those in memory that it is made from where it is not there itself: itself for most."""
    readers: dict[Value, list[str]] = {}
    for one in reversed(flat):
        through = [kind for made in one.makes for kind in readers.get(made, ())]
        for value in one.reads:
            readers.setdefault(value, []).extend(through if one.kind in VIEWS else [one.kind])
    for value in kept:
        readers.setdefault(value, []).append("the end")
    written = _products(flat, readers) if adds else set()
    sources: dict[Value, frozenset] = {}
    for one in flat:
        from_these = frozenset().union(*(sources.setdefault(value, frozenset([value])) for value in one.reads))
        for made in one.makes:
            inline = made not in written and set(readers.get(made, ())) <= DEAR | CHEAP | SUMS and (
                one.kind in CHEAP or (one.kind in DEAR and len(readers.get(made, ())) < 2))
            sources[made] = from_these if inline or one.kind in VIEWS else frozenset([made])
    return sources


def _products(flat: list[Flat], readers: dict[Value, list[str]]) -> set[Value]:
    """The sums that a product is added to as it is made: one that nothing else reads, in whatever shape or type."""
    products: set[Value] = set()  # and sums with one, to which another may be added
    sums: set[Value] = set()
    for one in flat:
        alone = any(value in products and len(readers[value]) < 2 for value in one.reads)
        if one.kind == "dot_general" or (alone and one.kind in VIEWS | ADDS | {"convert_element_type"}):
            products.update(one.makes)
            sums.update(one.makes if one.kind in ADDS else ())
    return sums


def _last(flat: list[Flat], sources: dict[Value, frozenset], kept: Iterable[Value]) -> dict[Value, int]:
    """Where each value in memory is read for the last time, beyond the end where it is kept."""
    last = {source: at for at, one in enumerate(flat) for value in one.reads for source in sources[value]}
    return last | {source: len(flat) for value in kept for source in sources.get(value, ())}


def _most(flat: list[Flat], sources: dict[Value, frozenset], given: set[Value], kept: list[Value], adds: bool) -> int:
    last = _last(flat, sources, kept)
    alive = most = 0
    for at, one in enumerate(flat):
        made = {value for value in one.makes if sources[value] == {value}}
        ends = {source for value in one.reads for source in sources[value] if last[source] == at} - given
        new, gone = (sum(value.bytes for value in values) for values in (made, ends))
        place = min(new, gone) if one.kind in DEAR | CHEAP else 0
        most = max(most, alive + max([new - place, *(peak(*body, adds=adds) for body in one.inside)]))
        alive += sum(value.bytes for value in made if value in last) - gone
    return most
