"""Every name of jax and flax that is not part of their public interfaces, in one place: what an upgrade may break."""

from flax.linen.module import InterceptorContext
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = ["ClosedJaxpr", "InterceptorContext", "Jaxpr", "Literal", "dce_jaxpr", "jaxpr_as_fun", "scan_counts"]


def scan_counts(parameters: dict) -> tuple[int, int]:
    """Of a scan's ``parameters``, how many of its arguments every turn is given, and how many it hands to the next."""
    if "num_carry" in parameters:  # before jax 0.11
        return parameters["num_consts"], parameters["num_carry"]
    constants, carry, _ = parameters["ft_in"].unpack()
    return len(constants), len(carry)
