"""How a forward pass reads quantised leaves: an interceptor for Dense, DenseGeneral, Einsum and Embed modules.

:func:`peft_jax.bind` enters it under all methods, so a model may hold such leaves whatever its method is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from peft_jax.core import kernel_axes
from peft_jax.errors import PeftJaxError
from peft_jax.parallel.mesh import features_together
from peft_jax.quant.matmul import attend, dot, take
from peft_jax.quant.qarray import QuantizedArray


def read(mesh, next_fun, args, kwargs, context) -> Any:
    """The module's output from its quantised weight, or of an embedding on a mesh; others are called as they are."""
    module, name = context.module, context.method_name
    leaf = _quantised(module)
    if leaf is None and mesh and isinstance(module, nn.Embed) and name == "__call__":
        return _rows_of(mesh, module, next_fun, *args)
    if leaf is None or name not in ("__call__", "attend", "setup"):
        return next_fun(*args, **kwargs)
    _check(module, name)
    if name == "setup":  # flax would compare the leaf's shape with the array's that the module would make
        return None
    if len(leaf.stack):
        raise PeftJaxError(f"{_where(module)} has one weight, and its quantised leaf is a stack of {leaf.stack}: give "
                           "init axes=peft_jax.kernel_axes(model, params, *inputs).")
    if isinstance(module, nn.Embed):
        return take(leaf, args[0], module.dtype) if name == "__call__" else attend(args[0], leaf, module.dtype)
    return _product(module, leaf, args[0])


def _rows_of(mesh, module: nn.Embed, next_fun, ids) -> Any:
    """Features of a table may be cut over the devices that ``ids`` are cut over: brought together first, or the
    compiler brings all rows of the batch together instead."""
    if mesh.size == 1 or not module.has_variable("params", "embedding"):
        return next_fun(ids)
    table = module.get_variable("params", "embedding")
    return take(features_together(mesh, table), ids, module.dtype or table.dtype)


def _quantised(module: nn.Module) -> QuantizedArray | None:
    for name in kernel_axes.HOLDERS:
        if module.has_variable("params", name):
            leaf = module.get_variable("params", name)
            if isinstance(leaf, QuantizedArray):
                return leaf
    return None


def _where(module) -> str:
    return f"'{'/'.join(module.path)}'"


def _check(module, name) -> None:
    """Raise ``PeftJaxError`` for a module that does anything else with its weight than what is done here."""
    own = any(getattr(module, field, None) is not None for field in ("dot_general", "dot_general_cls"))
    read_here = isinstance(module, nn.Dense | nn.DenseGeneral | nn.Einsum | nn.Embed)
    if own or not read_here or not kernel_axes.runs_as_flax_has_it(module, name):
        raise PeftJaxError(f"{_where(module)} is a {type(module).__name__} whose product is its own, and its weight is "
                           "quantised: name it in quantize(exclude_modules=...).")
    if not kernel_axes.input_count(module):
        raise PeftJaxError(f"{_where(module)} is a {type(module).__name__} of which the input and output axes are not "
                           "known, and its weight is quantised: name it in quantize(exclude_modules=...), or, of an "
                           "Einsum, give it a formula of one product, such as '...d,dh->...h', when it is made.")


def _product(module, leaf, x):
    bias = module.get_variable("params", "bias") if module.use_bias else None
    dtypes = [array.dtype for array in (x, bias) if array is not None]
    dtype = module.dtype or jnp.result_type(leaf.dtype, *dtypes)  # as flax promotes
    einsum = isinstance(module, nn.Einsum)
    y = dot(_contracted_last(module, x) if einsum else kernel_axes.inputs_last(module, x), leaf, dtype)
    if einsum:
        y, bias = _in_order(module, y), _spread(module, bias)
    return y if bias is None else y + bias.astype(dtype)


def _letters(module: nn.Einsum) -> tuple[str, str, str, str]:
    """Letters of (x, kernel's inputs, kernel's outputs, result); axes of an ellipsis are left out."""
    formula = (module.einsum_str or "").replace(" ", "").replace("...", "")  # _check has seen that there is one
    sides, result = formula.split("->")
    x, kernel = sides.split(",")
    inputs = "".join(letter for letter in kernel if letter not in result)
    return x, inputs, kernel.removeprefix(inputs), result


def _contracted_last(module, x):
    letters, inputs, _, _ = _letters(module)
    front = x.ndim - len(letters)
    return jnp.moveaxis(x, [front + letters.index(one) for one in inputs], range(-len(inputs), 0))


def _in_order(module, y):
    """y (..., batch letters of x, outputs) with its axes as the result has them."""
    letters, inputs, outputs, result = _letters(module)
    have = "".join(one for one in letters if one not in inputs) + outputs
    front = y.ndim - len(have)
    return jax.lax.transpose(y, (*range(front), *(front + have.index(one) for one in result)))


def _spread(module, bias):
    """The bias, which has the outputs' axes in the result's order, with an axis of one for each other letter."""
    if bias is None:
        return None
    *_, outputs, result = _letters(module)
    sizes = iter(bias.shape)
    return bias.reshape([next(sizes) if one in outputs else 1 for one in result])
