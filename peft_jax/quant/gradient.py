"""Gradients of a whole parameter tree, quantised leaves included, in a form that optax can add."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import arguments


def value_and_grad(loss: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """``jax.value_and_grad`` of a function of a whole parameter tree, which may hold quantised leaves.

    jax refuses to differentiate by integers, or gives float0, which optax cannot add. Here the codes of a quantised
    leaf get zeros of their own type, so that ``optax.set_to_zero`` and ``optax.apply_updates`` leave them as they are.
    Under ``jax.jit`` gradients that nobody uses are not computed.

    Args:
      loss: ``(params, *args, **kwargs) -> scalar``, or ``(scalar, aux)`` with ``has_aux``.

    Returns ``(params, *args, **kwargs) -> (value of loss, gradient)``; the gradient has the tree, the shapes and the
    types of ``params``. Raises ``PeftJaxError`` where ``loss`` is no function, and for ``params`` that are no tree.

    >>> from peft_jax import dequantize, quantize_array
    >>> params = {"scale": jnp.float32(3), "kernel": quantize_array(jnp.ones((64, 1)))}
    >>> value, gradient = value_and_grad(lambda p: p["scale"] * dequantize(p["kernel"]).sum())(params)
    >>> float(value), float(gradient["scale"]), gradient["kernel"].codes.dtype.name
    (192.0, 64.0, 'uint8')
    """
    arguments.check("value_and_grad", {"loss": loss})
    differentiated = jax.value_and_grad(loss, has_aux=has_aux, allow_int=True)

    def run(params, *args, **kwargs):
        arguments.check("value_and_grad(loss)", {"params": params})
        value, gradient = differentiated(params, *args, **kwargs)
        return value, jax.tree.map(_addable, params, gradient)

    return run


def _addable(leaf, gradient):
    return jnp.zeros_like(leaf) if gradient.dtype == jax.dtypes.float0 else gradient
