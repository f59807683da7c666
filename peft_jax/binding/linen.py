"""A method bound to a flax.linen model: its interceptor around ``model.apply``, and a check that all is read."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.core import Tracer
from jax.sharding import Mesh

from peft_jax.binding import linen_quantised, weight_reads
from peft_jax.core import arguments, kernel_axes, tree
from peft_jax.core._compat import ClosedJaxpr, InterceptorContext, dce_jaxpr, jaxpr_as_fun
from peft_jax.core.tree import check_method_leaves
from peft_jax.errors import PeftJaxError
from peft_jax.method import FROZEN, Method, with_interceptor
from peft_jax.models.attention import AttentionCore
from peft_jax.models.masks import RowMask
from peft_jax.parallel.mesh import output_apart, several


@dataclasses.dataclass(frozen=True)
class Context(InterceptorContext):
    """What an interceptor knows of a module's call: Flax's ``module``, ``method_name``, ``orig_method``, and

    rngs: the names of the random streams that ``apply`` was called with. A module in a lifted transform may see fewer.
    params: the whole parameter tree, for leaves that several modules share.
    notes: a dict, empty at the start of the pass. An interceptor writes there what it needs in a later module.
    of_flax: whether the call is of a Dense, DenseGeneral, Einsum or Embed module's product as flax has it. A subclass's
        own method is none, and a call of its parent's method inside it is one: a method beside the weight acts there.
    """

    rngs: frozenset[str]
    params: Mapping[str, Any]
    notes: dict[Any, Any]
    of_flax: bool


def bind(method: Method, model: nn.Module, mesh: Mesh | None = None) -> Callable[..., Any]:
    """``model.apply`` with the method in the forward pass: same signature, same results otherwise.

    The first call on a new tree structure checks the parameters. It raises ``PeftJaxError``

    * where they hold none of the method's leaves;
    * where the output does not depend on one of the leaves that train, and names it. Only a call of the whole model,
      without ``method=``, checks this; a call with a ``cache`` does not, as the cache may depend on that leaf;
    * where a weight that the method changes goes into more than its module's own product, so that the merged model
      would differ from the adapted one.

    Arguments of the wrong kind raise ``PeftJaxError`` at once.
    A method's dropout is active if ``rngs`` has a ``dropout`` key, else not. Quantised leaves are read under any
    method. On a ``mesh`` (:func:`peft_jax.make_mesh`) the rows of every module's output are split over the devices:
    so weights travel to the rows, not rows to the weights.
    """
    arguments.check("bind", {"method": method, "model": model, "mesh": mesh}, optional=("mesh",))
    sound: set[Any] = set()  # of calls that were checked: (method, whether with a cache, structure of the variables)

    def apply(variables, *args, rngs=None, **kwargs):
        kwargs |= {} if rngs is None else {"rngs": rngs}

        def run(params):
            interceptor = partial(_in_context, mesh, method.intercept, _streams(rngs), params, {})
            with nn.intercept_methods(interceptor):
                return model.apply({**variables, "params": params}, *args, **kwargs)

        params = _params_of(method, variables)
        name, cached = kwargs.get("method"), "cache" in variables
        code = getattr(inspect.unwrap(name), "__code__", name) if callable(name) else name  # a lambda's is one for all
        if (call := (code, cached, jax.tree.structure(variables))) in sound:
            return run(params)
        check_method_leaves(method, params)
        if method.leaves:
            tree.flatten_arrays(params)
        whole = not cached and name in (None, "__call__", type(model).__call__, model.__call__)
        result = _checked(method, run, params, kwargs.get("mutable", False), whole)
        sound.add(call)
        return result

    return apply


def _params_of(method: Method, variables: Any) -> Mapping[str, Any]:
    if not isinstance(variables, Mapping) or (method.leaves and "params" not in variables):
        raise PeftJaxError(f"a bound apply: the first argument is {arguments.described(variables)}: give "
                           "{'params': params} first, then the inputs, as to model.apply.")
    return variables.get("params", {})


def _streams(rngs) -> frozenset[str]:
    if rngs is None:
        return frozenset()
    return frozenset(rngs if isinstance(rngs, Mapping) else ("params",))  # a bare key is flax's "params" stream


def _in_context(mesh, intercept, rngs, params, notes, next_fun, args, kwargs, context):
    # To every interceptor this is the module's own method; it reads quantised leaves.
    reading = partial(with_interceptor, partial(linen_quantised.read, mesh), next_fun, context)
    of_flax = kernel_axes.is_call_of_flax(context)
    whole = Context(context.module, context.method_name, reading, rngs, params, notes, of_flax)
    args, kwargs = kernel_axes.input_first(context.module, context.method_name, args, kwargs)
    if isinstance(context.module, AttentionCore) and several(mesh) and isinstance(args[-1], RowMask):
        args = (*args[:-1], dataclasses.replace(args[-1], mesh=mesh))  # a TPU's kernel is not cut by the compiler
    own = jax.named_scope(kernel_axes.own_scope(tree.join(context.module.path))) if of_flax else nullcontext()
    with own:
        return output_apart(mesh, intercept(reading, args, kwargs, whole))


def _checked(method: Method, forward: Callable[[Mapping], Any], params: Mapping, mutable: Any, whole: bool) -> Any:
    """``forward(params)``, after the checks of :func:`_check_program`; ``mutable`` as of ``model.apply``.

    Inside ``jax.jit`` the model is traced once: the result comes from the program that was checked. Outside, the model
    runs after the check.
    """
    if not whole and not weight_reads.changed(method, params):
        return forward(params)
    flat, program, shapes = _traced(forward, params)
    _check_program(method, flat, program, _outputs(shapes, mutable), whole)
    if not isinstance(jnp.zeros(()), Tracer):
        return forward(params)
    values = jaxpr_as_fun(program)(*jax.tree.leaves(flat))
    return jax.tree.unflatten(jax.tree.structure(shapes), values)


def _outputs(result: Any, mutable: Any = False) -> list[bool]:
    """Whether each array of ``result`` is output: mutable parameters, which come back with it, are not."""
    if mutable is False:
        return [True] * len(jax.tree.leaves(result))
    output, variables = result
    changed = {name: jax.tree.map(lambda _, name=name: name != "params", own) for name, own in variables.items()}
    return _outputs(output) + jax.tree.leaves(changed)


def _traced(forward: Callable[[Mapping], Any], params: Mapping) -> tuple[dict[str, Any], ClosedJaxpr, Any]:
    """(leaves by path, the program of ``forward`` over them, the shapes of its results)."""
    flat = tree.flatten(params)
    program, shapes = jax.make_jaxpr(lambda leaves: forward(tree.unflatten(leaves)), return_shape=True)(flat)
    return flat, program, shapes


def check_read(method: Method, forward: Callable[[Mapping], Any], params: Mapping) -> None:
    """Raise ``PeftJaxError`` where ``forward(params)`` does not depend on a trainable leaf, or where a weight that the
    method changes goes into more than its module's own product; nothing is computed."""
    arguments.check("check_read", {"method": method, "forward": forward, "params": params})
    check_method_leaves(method, params)
    flat, program, shapes = _traced(forward, params)
    _check_program(method, flat, program, _outputs(shapes))


def _check_program(method: Method, flat: dict[str, Any], program: ClosedJaxpr, outputs: list[bool],
                   whole: bool = True) -> None:
    """Raise ``PeftJaxError`` where the ``whole`` model does not read a trainable leaf, and for a weight that the method
    changes and that is read elsewhere than in its module's product."""
    live, used = dce_jaxpr(program.jaxpr, outputs)
    if whole:
        _check_read(method, flat, jax.tree.unflatten(jax.tree.structure(flat), used))
    paths = weight_reads.paths(flat)
    weights = weight_reads.changed(method, tree.unflatten(flat))
    weight_reads.check(live, [path for path, on in zip(paths, used, strict=True) if on], weights)


def _check_read(method: Method, flat: dict[str, Any], read: Mapping[str, Any]) -> None:
    labels = tree.flatten(method.labels(tree.unflatten(flat)))
    idle = [path for path in flat if labels[path] != FROZEN and not any(jax.tree.leaves(read[path]))]
    if idle:
        raise PeftJaxError(f"the forward pass never reads {len(idle)} trainable leaves, the first is '{idle[0]}': the "
                           "module that owns it is not called, or is of a type that this method cannot change, such "
                           "as a subclass with a product of its own.")
