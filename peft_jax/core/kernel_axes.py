"""Which axes a module contracts: of its kernel, and of its input; the layout of every kernel of a model."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import errors
from flax import linen as nn

from peft_jax.core import arguments, tree
from peft_jax.errors import PeftJaxError

HOLDERS = ("kernel", "embedding")  # leaves that are a matrix from inputs to outputs; an embedding's inputs are ids
_CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvLocal")


class KernelAxes(NamedTuple):
    """How one kernel is laid out: ``(*stack, *inputs, *outputs)``, all sizes; ``kind`` is its module's type.

    ``inputs`` is empty for a module whose layout is not known; a method that is asked to change it raises.
    """

    kind: str
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def kernel_axes(model: nn.Module, params: Mapping[str, Any], *inputs,
                variables: Mapping[str, Any] | None = None, **kwargs) -> dict[str, KernelAxes]:
    """The layout of every kernel and embedding, by path, found by tracing ``model.apply`` once; nothing is computed.

    Dense and DenseGeneral kernels are understood; others are noted by their type. Modules that the pass with these
    ``inputs`` never calls are not listed. ``variables`` are the model's other collections, such as ``{"batch_stats":
    ...}``; further arguments go to ``model.apply``.

    Raises ``PeftJaxError`` where a leaf is no stack of its module's kernel, and where the model reads a collection that
    is not given.
    """
    arguments.check("kernel_axes", {"model": model, "params": params})
    layouts: dict[str, tuple[str, tuple[int, ...], int]] = {}

    def note(next_fun, args, keywords, context):
        module = context.module
        for leaf in HOLDERS if context.method_name == "__call__" else ():
            value = module.get_variable("params", leaf) if module.has_variable("params", leaf) else {}
            if not isinstance(value, Mapping):  # else it is a submodule of that name
                layouts[tree.join((*module.path, leaf))] = (_kind(module), value.shape, input_count(module))
        return next_fun(*args, **keywords)

    flat = tree.flatten_arrays(params)
    shapes = tree.map_paths(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)  # quantised ones too
    with nn.intercept_methods(note), _named_collections():
        jax.eval_shape(lambda p: model.apply({**(variables or {}), "params": p}, *inputs, **kwargs), shapes)
    layouts = {path: layout for path, layout in layouts.items() if path in flat}  # not of a model inside of the model
    return {path: _layout(path, flat[path].shape, *layout) for path, layout in layouts.items()}


@contextlib.contextmanager
def _named_collections() -> Iterator[None]:
    """What flax says of a collection that is lacking, with what to do."""
    try:
        yield
    except errors.ScopeCollectionNotFound as error:
        said = str(error).partition(" (http")[0].strip()
        raise PeftJaxError(f"kernel_axes: {said} Give the model's other collections, "
                           "variables={'batch_stats': ...}.") from error


def _kind(module: nn.Module) -> str:
    """The name of the module's type; a convolution's says that it is one."""
    name, convolution = type(module).__name__, isinstance(module, nn.Conv | nn.ConvTranspose | nn.ConvLocal)
    return f"{name} (convolution)" if convolution and name not in _CONVOLUTIONS else name


def is_convolution(axes: KernelAxes) -> bool:
    """Whether the kernel is of a convolution, of flax or a subclass of one."""
    return axes.kind in _CONVOLUTIONS or axes.kind.endswith(" (convolution)")


def _layout(path, leaf, kind, kernel, inputs) -> KernelAxes:
    front = len(leaf) - len(kernel)
    if front < 0 or leaf[front:] != kernel:
        raise PeftJaxError(f"'{path}' is {leaf} and its {kind} reads {kernel}: only stacks in front are understood "
                           "(nn.scan with variable_axes={'params': 0}).")
    return KernelAxes(kind, leaf[:front], kernel[:inputs], kernel[inputs:])


def plain_axes(shape: tuple[int, ...]) -> KernelAxes:
    """The plain rule, for our own models: two axes are (in, out), three are (stack, in, out), others are unknown."""
    if len(shape) in (2, 3):
        return KernelAxes("Dense", shape[:-2], shape[-2:-1], shape[-1:])
    return KernelAxes(f"kernel of {len(shape)} axes", (), (), ())


def input_count(module: nn.Module) -> int:
    """How many leading axes of a module's kernel are inputs; 0 where that is not known."""
    if isinstance(module, nn.Einsum) and module.einsum_str:
        return _einsum_inputs(module.einsum_str.replace(" ", ""))
    if isinstance(module, nn.Dense | nn.Embed):
        return 1
    if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
        return len(module.axis) if isinstance(module.axis, (tuple, list)) else 1
    return 0


def input_axes(module: nn.Module, ndim: int) -> tuple[int, ...]:
    """The axes of a Dense or DenseGeneral module's input that its kernel contracts, sorted, as flax contracts them."""
    axis = getattr(module, "axis", -1)
    return tuple(sorted(i % ndim for i in (axis if isinstance(axis, (tuple, list)) else (axis,))))


def inputs_last(module: nn.Module, x: jax.Array) -> jax.Array:
    """The module's input with the axes that its kernel contracts moved to the end."""
    axis = input_axes(module, x.ndim)
    return jnp.moveaxis(x, axis, range(-len(axis), 0))


def inputs_back(module: nn.Module, x: jax.Array) -> jax.Array:
    """The inverse of :func:`inputs_last`."""
    axis = input_axes(module, x.ndim)
    return jnp.moveaxis(x, range(-len(axis), 0), axis)


def runs_as_flax_has_it(module: nn.Module, method: str) -> bool:
    """Whether a module's ``method`` is flax's, and not of a subclass; nn.remat and the like make no difference."""
    owners = [kind for kind in type(module).__mro__ if method in vars(kind)]
    return all(kind.__module__.startswith("flax.") for kind in owners)


def is_call_of_flax(context: Any) -> bool:
    """Whether a call, by the context that flax gives an interceptor, is of a product as flax has it.

    A subclass's own ``__call__`` is none. Where that calls its parent's, the call inside it is one.
    """
    own = isinstance(context.module, nn.Dense | nn.DenseGeneral | nn.Einsum | nn.Embed)
    return own and context.method_name in ("__call__", "attend") and context.orig_method.func.__module__.startswith(
        "flax.")


def own_scope(folder: str) -> str:
    """The name, in a traced program, of what a module's own product does with the weights of ``folder``."""
    return f"own[{folder}]"


def input_first(module: nn.Module, method: str, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call, with the input of a module that has a kernel or an embedding as the first of ``args``,
    if it was given by its name."""
    name = "query" if method == "attend" else "inputs"
    if args or name not in kwargs or not isinstance(module, nn.Dense | nn.DenseGeneral | nn.Einsum | nn.Embed):
        return args, dict(kwargs)
    rest = {key: value for key, value in kwargs.items() if key != name}
    return (kwargs[name],), rest


def _einsum_inputs(formula: str) -> int:
    """Of ``x,kernel->result``: the kernel's contracted axes, where they stand in front and it is such a product.

    That is: no letter stands twice on one side or on all three, none of x is summed alone, and axes of an ellipsis
    stand in front of x and of the result.

    >>> _einsum_inputs("bnh,nhd->bd"), _einsum_inputs("bd,ndh->bnh"), _einsum_inputs("bnh,nhd->bnd")
    (2, 0, 0)
    >>> _einsum_inputs("btd,dh->bh"), _einsum_inputs("...d,dh->...h"), _einsum_inputs("b...d,dh->b...h")
    (0, 1, 0)
    """
    sides, result = formula.split("->")
    x, kernel = sides.split(",")
    if x.startswith("...") and result.startswith("..."):
        x, result = x[3:], result[3:]
    contracted = "".join(letter for letter in kernel if letter not in result)
    plain = kernel.startswith(contracted) and set(contracted) <= set(x) <= {*contracted, *result}
    alone = all(len(set(side)) == len(side) and "." not in side for side in (x, kernel, result))
    return len(contracted) if plain and alone and not set(kernel) & set(x) & set(result) else 0
