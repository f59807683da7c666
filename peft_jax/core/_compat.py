"""Every name of jax and flax that is not part of their public interfaces, in one place: what an upgrade may break."""

from flax.linen.module import InterceptorContext
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = ["ClosedJaxpr", "InterceptorContext", "Jaxpr", "Literal", "dce_jaxpr", "jaxpr_as_fun"]
