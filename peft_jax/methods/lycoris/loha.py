"""LoHa, the Hadamard product of two low-rank updates (FedPara, arXiv 2108.06098, prop. 1; LyCORIS, arXiv 2309.14859).

    y = x W + x dW        dW = (alpha / r) (B1 A1) * (B2 A2)        * element by element

dW has a rank of up to r^2 at the size of a LoRA of rank 2 r. Beside each adapted ``kernel`` (*stack, *in, *out) stand
``hada_w1_a`` and ``hada_w2_a`` (*stack, r, *out), ``hada_w1_b`` and ``hada_w2_b`` (*stack, *in, r), and the frozen
``hada_scaling`` (*stack). B2 starts at zero, so that training starts from the base model. dW is as large as the kernel:
the backward pass computes it again instead of keeping it.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import kernel_axes
from peft_jax.core.peft_format import Format, arguments_of
from peft_jax.core.targeting import Patterns, Target
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lycoris import common

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LEAVES = (*FACTORS, "hada_scaling")


def loha(r: int = 8, alpha: float = 8, target_modules: Patterns = ("q_proj", "v_proj"), rank_dropout: float = 0.0,
         module_dropout: float = 0.0, *, exclude_modules: Patterns = None,
         layers_to_transform: int | tuple[int, ...] | None = None, layers_pattern: Patterns = None,
         rank_pattern: Mapping[str, int] | None = None, alpha_pattern: Mapping[str, float] | None = None,
         modules_to_save: tuple[str, ...] | None = None, init_weights: bool = True) -> Method:
    """LoHa with the arguments, meanings and defaults of Hugging Face peft's ``LoHaConfig``, linear modules only.

    Args:
      r: rank of each of the two factors. alpha: numerator of the scale alpha / r.
      target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as of
        :func:`peft_jax.lora`.
      rank_dropout: probability that an output element of the update is off; the others are raised to keep their mean.
      module_dropout: probability that a module's whole update is off. Both need ``rngs={"dropout": key}``.
      rank_pattern, alpha_pattern: ``{regex for the end of a name: value}``, exceptions from r and alpha.
      init_weights: False starts B2 at random too (not the base model at the start; for tests).

    Returns a :class:`Method`; its leaves are float32.

    >>> method = loha(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> {name: leaf.shape for name, leaf in params["up_proj"].items() if name.startswith("hada_w1")}
    {'hada_w1_a': (4, 8), 'hada_w1_b': (6, 4)}

    Raises ``PeftJaxError`` for values out of range, and from ``init`` for patterns that match nothing.
    """
    config = common.tidy(
        (True, False), peft_type="LOHA", r=r, alpha=alpha, target_modules=target_modules, rank_dropout=rank_dropout,
        module_dropout=module_dropout, exclude_modules=exclude_modules, layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern,
        modules_to_save=modules_to_save, init_weights=init_weights)
    method = kernel_adapter.method(
        config, trained=FACTORS, switch="hada_scaling", leaves=_leaves, intercept=partial(_intercept, config),
        fold=lambda kernel, *leaves: kernel + delta(*leaves), stored=FORMAT,
        along={name: (None, "outputs") if name.endswith("a") else ("inputs", None) for name in FACTORS})
    return method._replace(padding=partial(common.padding, config=config, leaves=FACTORS, scaling="hada_scaling"))


def _leaves(config: Mapping[str, Any], key: jax.Array, target: Target, kernel: Any) -> dict[str, jax.Array]:
    _, stack, inputs, outputs = target.axes
    each = common.ranks(config, target.names).reshape(stack)
    most, new = int(each.max()), {}
    for name, one in zip(FACTORS, jax.random.split(key, len(FACTORS))):
        shape, fan_in = ((most, *outputs), most) if name.endswith("_a") else ((*inputs, most), math.prod(inputs))
        zero = name == "hada_w2_b" and config["init_weights"]
        new[name] = common.factor(one, (*stack, *shape), fan_in, each, name, zero)
    return {**new, "hada_scaling": common.scalings(config, target)}


def _intercept(config: Mapping[str, Any], next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any,
               ) -> Any:
    y, module = next_fun(*args, **kwargs), context.module
    if (leaves := kernel_adapter.read(module, context, LEAVES, "LoHa")) is None:
        return y
    x = kernel_axes.inputs_last(module, args[0]).astype(y.dtype)
    tokens = x.reshape(-1, math.prod(leaves[1].shape[:-1]))
    change = common.thinned(module, context, branch(tokens, *leaves), config, scaled=True)
    return y + change.reshape(y.shape)


@jax.checkpoint
def branch(x: jax.Array, w1_a: jax.Array, w1_b: jax.Array, w2_a: jax.Array, w2_b: jax.Array, scaling: jax.Array,
           ) -> jax.Array:
    """x dW for x (tokens, in): (tokens, out) in x's dtype; dW is not kept for the backward pass."""
    return x @ delta(w1_a, w1_b, w2_a, w2_b, scaling).reshape(x.shape[-1], -1).astype(x.dtype)


def delta(w1_a: jax.Array, w1_b: jax.Array, w2_a: jax.Array, w2_b: jax.Array, scaling: jax.Array) -> jax.Array:
    """The update (alpha / r) (B1 A1) * (B2 A2), float32 (*stack, *in, *out), of the leaves of one module."""
    stack, rank = scaling.shape, w1_b.shape[-1]

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(b.reshape(*stack, -1, rank), a.reshape(*stack, rank, -1), precision="highest")

    both = product(w1_a, w1_b) * product(w2_a, w2_b) * scaling[..., None, None]
    return both.reshape(*w1_b.shape[:-1], *w1_a.shape[len(stack) + 1:])


# An effective decomposition is for convolutions alone, which are not adapted here.
FORMAT = Format(kind="LOHA", make=loha, arguments=arguments_of(loha),
                slots=partial(common.slots, FACTORS, "hada_scaling"), fields=common.fields,
                silent=("use_effective_conv2d",))
