"""A method bound to a flax.linen model: its interceptor around ``model.apply``, and a check that all is read."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.core import Tracer
from jax.sharding import Mesh

from peft_jax.binding import linen_quantised
from peft_jax.core import arguments, kernel_axes, tree
from peft_jax.core._compat import ClosedJaxpr, InterceptorContext, dce_jaxpr, jaxpr_as_fun
from peft_jax.core.tree import check_method_leaves
from peft_jax.errors import PeftJaxError
from peft_jax.method import FROZEN, Method, with_interceptor
from peft_jax.parallel.mesh import output_apart


@dataclasses.dataclass(frozen=True)
class Context(InterceptorContext):
    """Flax's ``module``, ``method_name`` and ``orig_method``, and of the whole call:

    rngs: the names of its random streams; a module inside a lifted transform may see fewer, here a method can tell.
    params: the whole parameter tree, for leaves that several modules share.
    notes: empty at the start of the pass; what an interceptor saw in one module and needs in a later one.
    """

    rngs: frozenset[str]
    params: Mapping[str, Any]
    notes: dict[Any, Any]


def bind(method: Method, model: nn.Module, mesh: Mesh | None = None) -> Callable[..., Any]:
    """``model.apply`` with the method in the forward pass: same signature, same results otherwise.

    The first call of the whole model (no ``method=`` argument) on a new tree structure also checks that the output
    depends on every trainable leaf that the method added, and raises ``PeftJaxError`` naming those it does not; not
    with a ``cache``, which may hold what was computed from them. It raises, too, where the parameters hold none of the
    method's leaves. Arguments of another kind are a ``PeftJaxError`` at once.
    Dropout of a method is active where a ``dropout`` key is in ``rngs``, and only there. Quantised leaves are read
    under any method. On a ``mesh`` (:func:`peft_jax.make_mesh`) every module's output, an array with rows in front, has
    its rows split over it: so weights travel to the rows.
    """
    arguments.check("bind", {"method": method, "model": model, "mesh": mesh}, optional=("mesh",))
    sound: set[Any] = set()  # (name of the model's method, structure of the variables) of calls that were checked

    def apply(variables, *args, rngs=None, **kwargs):
        kwargs |= {} if rngs is None else {"rngs": rngs}

        def run(params):
            interceptor = partial(_in_context, mesh, method.intercept, _streams(rngs), params, {})
            with nn.intercept_methods(interceptor):
                return model.apply({**variables, "params": params}, *args, **kwargs)

        params = _params_of(method, variables)
        name = kwargs.get("method")
        if name in (None, "hidden") and (call := (name, jax.tree.structure(variables))) not in sound:
            check_method_leaves(method, params)
            result = _checked(method, run, params) if name is None and "cache" not in variables else run(params)
            sound.add(call)
            return result
        return run(params)

    return apply


def _params_of(method: Method, variables: Any) -> Mapping[str, Any]:
    if not isinstance(variables, Mapping) or (method.leaves and "params" not in variables):
        raise PeftJaxError(f"a bound apply was given {arguments.described(variables)}: give {{'params': params}} "
                           "first, then the model's inputs, as of model.apply.")
    return variables.get("params", {})


def _streams(rngs) -> frozenset[str]:
    if rngs is None:
        return frozenset()
    return frozenset(rngs if isinstance(rngs, Mapping) else ("params",))  # a bare key is flax's "params" stream


def _in_context(mesh, intercept, rngs, params, notes, next_fun, args, kwargs, context):
    # What the module's own method is to all methods:
    reading = partial(with_interceptor, partial(linen_quantised.read, mesh), next_fun, context)
    whole = Context(context.module, context.method_name, reading, rngs, params, notes)
    args, kwargs = kernel_axes.input_first(context.module, context.method_name, args, kwargs)
    return output_apart(mesh, intercept(reading, args, kwargs, whole))


def _checked(method: Method, forward: Callable[[Mapping], Any], params: Mapping) -> Any:
    """``forward(params)``, after a check that it reads every trainable leaf.

    Inside ``jax.jit`` the model is traced once: the result comes from the program that was checked. Outside, where a
    model may look at the values of its inputs, it runs after the check.
    """
    flat, program, shapes = _traced(forward, params)
    _check_program(method, flat, program)
    if not isinstance(jnp.zeros(()), Tracer):
        return forward(params)
    values = jaxpr_as_fun(program)(*jax.tree.leaves(flat))
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def _traced(forward: Callable[[Mapping], Any], params: Mapping) -> tuple[dict[str, Any], ClosedJaxpr, Any]:
    """(leaves by path, the program of ``forward`` over them, the shapes of its results)."""
    flat = tree.flatten(params)
    program, shapes = jax.make_jaxpr(lambda leaves: forward(tree.unflatten(leaves)), return_shape=True)(flat)
    return flat, program, shapes


def check_read(method: Method, forward: Callable[[Mapping], Any], params: Mapping) -> None:
    """Raise ``PeftJaxError`` naming trainable leaves without influence on ``forward(params)``; only traces."""
    arguments.check("check_read", {"method": method, "forward": forward, "params": params})
    check_method_leaves(method, params)
    flat, program, _ = _traced(forward, params)
    _check_program(method, flat, program)


def _check_program(method: Method, flat: dict[str, Any], program: ClosedJaxpr) -> None:
    _, used = dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
    read = jax.tree.unflatten(jax.tree.structure(flat), used)
    labels = tree.flatten(method.labels(tree.unflatten(flat)))
    idle = [path for path in flat if labels[path] != FROZEN and not any(jax.tree.leaves(read[path]))]
    if idle:
        raise PeftJaxError(f"the forward pass never reads {len(idle)} trainable leaves, the first is '{idle[0]}': the "
                           "module that owns it is not called, or is of a type that this method cannot change.")
