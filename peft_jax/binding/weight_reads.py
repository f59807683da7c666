"""Whether a model reads a weight elsewhere than in its own module's product: merged and adapted would then differ.

A method beside a kernel adds to what its module computes; a merge changes the kernel itself. Both are the same where
all that the forward pass does with the kernel is the module's own product, as flax has it. So :func:`peft_jax.bind`
names every such call in the traced program (``own_scope``), and here every equation that takes the kernel must carry
that name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from peft_jax.core import kernel_axes, tree
from peft_jax.core._compat import Jaxpr, Literal
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method

_INNER = ("jaxpr", "call_jaxpr", "body_jaxpr", "branches")  # where equations keep the programs that they run


def changed(method: Method, params: Mapping[str, Any]) -> set[str]:
    """The paths of the leaves that a merge would compute from others, as W + s A B is; nothing is computed.

    Parts that cannot be merged count where they say how their leaves lie beside a kernel, as mixed adapters do.
    """
    parts = method.parts or (method,)
    beside = {path.rpartition("/")[0] for path in tree.flatten(params) for part in parts
              if part.fold is None and path.rpartition("/")[2] in part.along}
    kernels = {f"{folder}/{holder}".lstrip("/") for folder in beside for holder in kernel_axes.HOLDERS}
    return _folded([part for part in parts if part.fold], params) | (kernels & tree.flatten(params).keys())


def _folded(parts: list[Method], params: Mapping[str, Any]) -> set[str]:
    def fold(flat: dict[str, Any]) -> dict[str, Any]:
        params = tree.unflatten(flat)
        for part in parts:
            params = part.fold(params) if part.fold else params
        return tree.flatten(params)

    flat = tree.flatten(params)
    program, merged = jax.make_jaxpr(fold, return_shape=True)(flat)
    sources = {var: {path} for var, path in zip(program.jaxpr.invars, paths(flat), strict=True)}
    for equation in program.eqns:
        some = set().union(*(sources.get(var, ()) for var in equation.invars if not isinstance(var, Literal)))
        sources |= dict.fromkeys(equation.outvars, some)
    outputs = zip(program.jaxpr.outvars, paths(merged), strict=True)
    return {path for var, path in outputs if not isinstance(var, Literal) and sources.get(var, set()) - {path}}


def paths(flat: Mapping[str, Any]) -> list[str]:
    """The path of each array of ``jax.tree.leaves(flat)``: a quantised leaf has several."""
    return jax.tree.leaves({path: jax.tree.map(lambda _, path=path: path, leaf) for path, leaf in flat.items()})


def check(program: Jaxpr, arguments: list[str], weights: set[str]) -> None:
    """Raise ``PeftJaxError`` where ``program`` reads one of ``weights`` outside of its module's own call.

    Args:
      program: without what its outputs do not depend on.
      arguments: the path of each of its arguments.
    """
    watched = {var: path for var, path in zip(program.invars, arguments, strict=True) if path in weights}
    for path in _read_elsewhere(program, watched):
        raise PeftJaxError(f"'{path}' would be changed by a merge, and the model does more with it than its module's "
                           "own product (another module reads it, a subclass changes it first, or an nn.jit inside "
                           "remembers a call without the method), so that merged and adapted would differ: leave "
                           f"'{path.rpartition('/')[0]}' out, or give the other reader a weight of its own.")


def _read_elsewhere(program: Jaxpr, watched: Mapping[Any, str]) -> Iterator[str]:
    for equation in program.eqns:
        mine = {i: watched[var] for i, var in enumerate(equation.invars)
                if not isinstance(var, Literal) and var in watched}
        scopes = str(equation.source_info.name_stack) if mine else ""
        mine = {i: path for i, path in mine.items() if kernel_axes.own_scope(path.rpartition("/")[0]) not in scopes}
        yield from _within(equation, mine)
    yield from (watched[var] for var in program.outvars if not isinstance(var, Literal) and var in watched)


def _within(equation: Any, mine: Mapping[int, str]) -> Iterator[str]:
    """Of an equation's arguments ``mine``, by number, those that the programs inside it read; of others, all."""
    inner = _programs(equation) if mine else []
    first = min((len(equation.invars) - len(program.invars) for program in inner), default=len(equation.invars))
    yield from (path for i, path in mine.items() if i < first)
    for program in inner:
        yield from _read_elsewhere(program, {program.invars[i - first]: path for i, path in mine.items() if i >= first})


def _programs(equation: Any) -> list[Jaxpr]:
    """The programs of a scan, a remat, a jit, a branch, ...: their arguments are the equation's last ones."""
    values = [equation.params[name] for name in _INNER if name in equation.params]
    several = [one for value in values for one in (value if isinstance(value, tuple | list) else (value,))]
    programs = [getattr(one, "jaxpr", one) for one in several]
    return [one for one in programs if isinstance(one, Jaxpr) and len(one.invars) <= len(equation.invars)]
