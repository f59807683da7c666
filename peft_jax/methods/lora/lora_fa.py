"""LoRA-FA, LoRA with A frozen (arXiv 2308.03303, section 3.1): only B trains.

    y = x W + s (drop(x) A) B

A stays as it was drawn, so B sees the same r directions of the input throughout. B starts at zero. Where a kernel is
square it is half of LoRA's parameters, and its gradient needs x A, r numbers a token, instead of x. The stored adapter
is a LoRA's, A included.
peft's ``create_lorafa_optimizer`` freezes A as well, and also multiplies B's gradient by (A A^T)^-1 / s^2 before Adam,
which the paper's first version and this file do not.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any

from peft_jax.core import tree
from peft_jax.core.peft_format import Naming, Slot
from peft_jax.method import FROZEN, Method
from peft_jax.methods.lora.lora import FORMAT as LORA
from peft_jax.methods.lora.lora import lora, padding
from peft_jax.methods.lora.peft_file import slots


def lorafa(*args: Any, **kwargs: Any) -> Method:
    """LoRA-FA: the arguments of :func:`peft_jax.lora`. What was saved loads as a LoRA, whose A trains.

    >>> method = lorafa(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> method.labels(params)["up_proj"]
    {'kernel': 'frozen', 'lora_a': 'frozen', 'lora_b': 'trainable', 'lora_scaling': 'frozen'}

    Raises ``PeftJaxError`` as ``lora`` does.
    """
    return _frozen(lora(*args, **kwargs))


lorafa.__signature__ = signature(lora)  # pyright: ignore[reportFunctionMemberAccess]


def _frozen(method: Method) -> Method:
    """A LoRA without training of A, which its file holds nevertheless."""

    again: Any = method.prepare

    def labels(params: Mapping[str, Any]) -> tree.Tree:
        return tree.map_paths(lambda path, label: FROZEN if path.rpartition("/")[2] == "lora_a" else label,
                              method.labels(params))

    def prepare(*args: Any, **kwargs: Any) -> Method:
        return _frozen(again(*args, **kwargs))

    return method._replace(labels=labels, stored=FORMAT, padding=partial(_padding, method.config),
                           prepare=prepare if again else None)


def _padding(config: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    return padding(config, params, ("lora_b",))


def _slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
           ) -> dict[str, Slot]:
    paths = [path for path in flat if path in trained or path.rpartition("/")[2] == "lora_a"]
    return slots(config, flat, paths, naming)


# What was saved loads as a LoRA: no file is claimed.
FORMAT = LORA._replace(make=lorafa, slots=_slots, claims=lambda stated: False)
SHOWN = {"arguments": {"r": 16, "lora_alpha": 32}}  # in tables and benchmarks
