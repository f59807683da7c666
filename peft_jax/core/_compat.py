"""Every name of jax and flax that is not part of their public interfaces, in one place: what an upgrade may break."""

from collections.abc import Callable
from inspect import signature
from typing import Any

from flax.linen.module import InterceptorContext
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr

__all__ = ["ClosedJaxpr", "InterceptorContext", "Jaxpr", "Literal", "dce_jaxpr", "gpu_kernel", "jaxpr_as_fun",
           "scan_counts", "splash_backward"]


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


def splash_backward(kernel, query, key, value, segment_ids, out, sums, cotangent) -> tuple:
    """The gradients by query, key and value that a splash attention ``kernel`` has, of its result ``out``, (N, T, H),
    and the logarithms (N, T) of its softmax's ``sums``: jax offers them together with the forward pass alone."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import _splash_attention_bwd

    names = ("save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function",
             "attn_logits_soft_cap", "interpret")
    residuals = (query, key, value, segment_ids, None, out, sums, kernel.dq_mask_info, kernel.dkv_mask_info)
    return _splash_attention_bwd(**{name: kernel.kwargs[name] for name in names}, res=residuals, do=cotangent)[3:6]
