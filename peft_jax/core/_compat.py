"""Every name of jax and flax that is not part of their public interfaces, in one place: what an upgrade may break."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from flax.linen.module import InterceptorContext
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = ["ClosedJaxpr", "InterceptorContext", "Jaxpr", "Literal", "dce_jaxpr", "gpu_kernel", "jaxpr_as_fun",
           "scan_counts"]


def scan_counts(parameters: dict) -> tuple[int, int]:
    """Of a scan's ``parameters``, how many of its arguments every turn is given, and how many it hands to the next."""
    if "num_carry" in parameters:  # before jax 0.11
        return parameters["num_consts"], parameters["num_carry"]
    constants, carry, _ = parameters["ft_in"].unpack()
    return len(constants), len(carry)


def gpu_kernel(body: Callable[..., None], out: Any, **options: Any) -> Callable[..., Any]:
    """``jax.experimental.pallas.mosaic_gpu.kernel``, whose results' shapes have another name in jax 0.10.0."""
    from jax.experimental.pallas import mosaic_gpu  # here, as importing Pallas takes half a second

    name = "out_type" if "out_type" in signature(mosaic_gpu.kernel).parameters else "out_shape"
    return mosaic_gpu.kernel(body, **{name: out}, **options)
