"""DoRA, weight-decomposed low-rank adaptation (arXiv 2402.09353, eqs. 5, 6 and 11).

    y = m / ||W + s A B|| * (x W + s x A B) + bias        the norm of each output's column, over the inputs

m starts at the norm, so that training starts from the base model, to rounding. The norm counts as a constant in the
backward pass (section 4.3). Beside LoRA's leaves stands ``lora_magnitude`` (*stack, *out), m. Dropout acts as in peft:
y = x W + bias + (m / norm - 1) d W + m / norm s d A B for the dropped input d.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from peft_jax.core import kernel_axes
from peft_jax.core.peft_format import Naming, Slot
from peft_jax.core.remat import keep
from peft_jax.core.targeting import Target
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora.lora import ALONG, build, leaves, lora, padding
from peft_jax.methods.lora.lora import FORMAT as LORA
from peft_jax.methods.lora.low_rank import branch, delta
from peft_jax.methods.lora.peft_file import KEYS as LORA_KEYS
from peft_jax.methods.lora.peft_file import fields, slots, view
from peft_jax.quant import dot, is_leaf, plain

LEAVES = ("lora_a", "lora_b", "lora_magnitude", "lora_scaling")


def dora(*args: Any, **kwargs: Any) -> Method:
    """DoRA: the arguments of :func:`peft_jax.lora`, with peft's ``use_dora``; kernels only, no embeddings.

    >>> method = dora(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items()}
    {'kernel': (6, 8), 'lora_a': (6, 4), 'lora_b': (4, 8), 'lora_scaling': (), 'lora_magnitude': (8,)}

    Raises ``PeftJaxError`` as ``lora`` does.
    """
    config = {**lora(*args, **kwargs).config, "use_dora": True}
    return _method(config)


dora.__signature__ = signature(lora)  # pyright: ignore[reportFunctionMemberAccess]


def _method(config: Mapping[str, Any], starts: Mapping[str, jax.Array] | None = None) -> Method:
    method = build(config, starts, _method, trained=LEAVES[:3], leaves=partial(_leaves, starts=starts),
                   intercept=partial(_intercept, config["lora_dropout"]), fold=_fold, stored=FORMAT,
                   along={**ALONG, "lora_magnitude": ("outputs",)}, first="dora")
    return method._replace(padding=partial(_padding, config), vectors=("lora_magnitude",))


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any,
            starts: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
    new = leaves(config, key, target, kernel, starts)
    norm = _norm(new.get("kernel", kernel), new["lora_a"], new["lora_b"], new["lora_scaling"])
    return {**new, "lora_magnitude": jnp.where(_spread(new["lora_scaling"], norm) != 0, norm, 0)}


def _norm(kernel: Any, a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
    """||W + s A B|| of each output, float32 (*stack, *out), the sum made as it is."""
    whole, front = plain(kernel, jnp.float32) + delta(a, b, scaling), scaling.ndim
    return jnp.sqrt((whole**2).sum(range(front, a.ndim - 1)))


def _spread(scaling: jax.Array, norm: jax.Array) -> jax.Array:
    return scaling.reshape(*scaling.shape, *[1] * (norm.ndim - scaling.ndim))


def _ratio(magnitude: jax.Array, norm: jax.Array, scaling: jax.Array) -> jax.Array:
    """m / norm; one where there is nothing to rescale, and in layers of a stack that are not adapted."""
    scales = (_spread(scaling, norm) != 0) & (norm > 0)
    return jnp.where(scales, magnitude / jnp.where(scales, norm, 1), 1)


def _intercept(dropout: float, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    y, module = next_fun(*args, **kwargs), context.module
    if (own := kernel_adapter.read(module, context, LEAVES, "DoRA")) is None:
        return y
    a, b, magnitude, scaling = own
    flat, weight = y.reshape(-1, magnitude.size), module.get_variable("params", "kernel")
    kernel = plain(weight, y.dtype).reshape(-1, magnitude.size)
    a, b = (leaf.astype(y.dtype) for leaf in (a.reshape(len(kernel), -1), b.reshape(-1, magnitude.size)))
    norm = keep(_column_norm(*map(stop_gradient, (kernel, a, b, scaling))))
    beyond = (_ratio(magnitude.ravel(), norm, scaling) - 1).astype(y.dtype)  # less 1 before it is rounded

    x = kernel_axes.inputs_last(module, args[0])
    dropped = kernel_adapter.dropped(module, context, x, dropout, "lora_dropout")
    bias = module.get_variable("params", "bias").astype(y.dtype).ravel() if module.use_bias else 0
    dropped, whole = dropped.astype(y.dtype), dropped is x
    dense = flat - bias if whole else dot(dropped, weight).reshape(flat.shape) if is_leaf(weight) else (
        dropped.reshape(-1, len(kernel)) @ kernel)
    low = branch(dropped, a, b, scaling)
    return (flat + low + beyond * keep(dense + low)).reshape(y.shape)


def _column_norm(kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: jax.Array) -> jax.Array:
    """||W + s A B|| of each output, float32 (out,), for W (in, out), A (in, r), B (r, out): W + s A B is never made."""
    times = partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
    square = (kernel.astype(jnp.float32)**2).sum(0)
    mixed = 2 * times(a.T, kernel) + scaling * times(times(a.T, a), b.astype(jnp.float32))
    return jnp.sqrt(jnp.maximum(square + scaling * (mixed * b).sum(0), 0))


def _fold(kernel: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array, scaling: jax.Array) -> jax.Array:
    """m / ||W + s A B|| (W + s A B)."""
    ratio = _ratio(magnitude, _norm(kernel, a, b, scaling), scaling)
    inside = kernel.ndim - magnitude.ndim
    return (kernel + delta(a, b, scaling)) * jnp.expand_dims(ratio, range(scaling.ndim, scaling.ndim + inside))


def _padding(config: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    return padding(config, params) + kernel_adapter.padding(params, config, ("lora_magnitude",), "lora_scaling")


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    return slots(config, flat, trained, naming, KEYS, _view)


def _view(config: Mapping[str, Any], leaf: str, name: str) -> Callable | None:
    if leaf != "lora_magnitude":
        return view(config, leaf, name)
    return (lambda magnitude: magnitude.reshape(-1)) if kernel_adapter.chosen(config, [name])[0] else None


def _fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    return {**fields(config, flat, naming), "use_dora": True}


KEYS = {**LORA_KEYS, "lora_magnitude": "lora_magnitude_vector"}
FORMAT = LORA._replace(make=dora, slots=_slots, fields=_fields, silent=(*LORA.silent, "use_dora"),
                       claims=lambda stated: bool(stated.get("use_dora")))
SHOWN = {"arguments": {"r": 16, "lora_alpha": 32}}  # in tables and benchmarks
