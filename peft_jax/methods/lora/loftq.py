"""LoftQ (arXiv 2310.08659, algorithm 1): a quantised kernel and a LoRA that begins with the error of quantising it.

    repeat  Q = quantise(W - s A B),  A B = the r largest singular values of (W - Q) / s

so that Q + s A B is nearer to W at the start than Q alone. With one round Q is what ``quantize`` makes of W: such an
adapter is a plain LoRA on that base, here or in peft, and needs it quantised likewise: on the plain W it would be wrong
by what quantising takes away, as in peft, where nothing says so either. More rounds give a base of its own; no adapter
file has room for it, and the whole model is saved instead.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import quant
from peft_jax.core import targeting, validation
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora.low_rank import delta
from peft_jax.methods.quantize import conversion

NAME = "loftq"
DEFAULTS = {"quant_type": "nf4", "block_size": 64, "double_quant": False, "loftq_iter": 1}


def settings(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The codec, as of :func:`peft_jax.quantize`, and the rounds, with ``options`` in place of defaults; raises
    ``PeftJaxError`` for what is none."""
    return validation.check_settings("loftq_config", options, DEFAULTS, "{'loftq_iter': 5}")


def check(options: Mapping[str, Any] | None) -> None:
    """Raise ``PeftJaxError`` for a setting that there is not, or a value out of range."""
    asked = settings(options)
    validation.check_whole("loftq_config['loftq_iter']", asked["loftq_iter"])
    quant.check(asked["quant_type"], asked["block_size"], asked["double_quant"])


def keeps_base(how: Any, options: Mapping[str, Any] | None) -> bool:
    """Whether an adapter so begun stands on the base that ``quantize`` gives, or on any base but for this start."""
    return how != NAME or settings(options)["loftq_iter"] == 1


def base(config: Mapping[str, Any]) -> Method | None:
    """What quantises a base as an adapter of a LoRA's ``config`` needs it; ``None`` where it needs nothing of it."""
    if config["init_lora_weights"] != NAME or not keeps_base(NAME, config["loftq_config"]):
        return None
    codec = {name: value for name, value in settings(config["loftq_config"]).items() if name != "loftq_iter"}
    return conversion({**codec, **kernel_adapter.selection(config), "product": "plain"}, holders=("kernel",))


def start(options: Mapping[str, Any] | None, target: targeting.Target, kernel: Any, ranks: np.ndarray,
          scaling: np.ndarray) -> tuple[jax.Array, jax.Array, quant.QuantizedArray]:
    """A (*stack, in, r), B (*stack, r, out) and the quantised kernel of a target; zero beyond each layer's own rank."""
    asked = settings(options)
    _, stack, inputs, outputs = target.axes
    if left := [name for name, rank in zip(target.names, ranks.reshape(-1)) if not rank]:
        raise PeftJaxError(f"init_lora_weights='loftq' quantises all {len(target.names)} layers of '{target.path}', "
                           f"one leaf, and '{left[0]}' gets no LoRA to correct that: adapt all of them, or none.")
    matrix = kernel.astype(jnp.float32).reshape(*stack, int(np.prod(inputs)), int(np.prod(outputs)))
    most, rest = int(ranks.max()), matrix
    inside = np.arange(most) < ranks[..., None]
    for _ in range(asked["loftq_iter"]):  # at least one round, see check
        quantised = quant.quantize_array(rest.reshape(kernel.shape).astype(kernel.dtype), asked["quant_type"],
                                         block_size=asked["block_size"], double_quant=asked["double_quant"],
                                         stack=stack, inputs=inputs, outputs=outputs)
        error = matrix - quant.dequantize(quantised, jnp.float32).reshape(matrix.shape)
        u, s, v = jnp.linalg.svd(error, full_matrices=False)
        root = jnp.sqrt(s[..., :most] / np.where(ranks > 0, scaling, 1)[..., None])
        a = jnp.where(inside[..., None, :], u[..., :most] * root[..., None, :], 0)
        b = jnp.where(inside[..., None], root[..., None] * v[..., :most, :], 0)
        rest = matrix - delta(a, b, jnp.asarray(scaling))
    return a, b, quantised  # pyright: ignore[reportPossiblyUnbound]
