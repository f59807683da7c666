"""LoRA+, a higher learning rate for B (arXiv 2402.12354, section 4): LoRA whose leaves come in groups.

    A: rate, B: ratio times rate, with a ratio well above one

This file says which leaf is in which group, by the leaf's label. The ratio belongs to the optimiser: ``optim.rates``,
such as ``{"lora_b": 16}``. As with peft's ``create_loraplus_optimizer``, trained vectors (biases, norm scales) are in
B's group, and A and B of an embedding have a group of their own.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from peft_jax.core import tree
from peft_jax.method import FROZEN, Method
from peft_jax.methods.lora.lora import lora
from peft_jax.methods.lora.peft_file import KEYS

VECTORS = ("bias", "scale")


def loraplus(*args: Any, **kwargs: Any) -> Method:
    """LoRA+: the arguments of :func:`peft_jax.lora`, the groups "trainable", "lora_b" and "lora_embedding".

    The adapter file is a LoRA's, and loads as one.

    >>> method = loraplus(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> method.labels(params)["up_proj"]
    {'kernel': 'frozen', 'lora_a': 'trainable', 'lora_b': 'lora_b', 'lora_scaling': 'frozen'}

    Raises ``PeftJaxError`` as ``lora`` does.
    """
    return _grouped(lora(*args, **kwargs))


loraplus.__signature__ = signature(lora)  # pyright: ignore[reportFunctionMemberAccess]


def _grouped(method: Method) -> Method:
    again: Any = method.prepare

    def labels(params: Mapping[str, Any]) -> tree.Tree:
        flat = tree.flatten(params)
        return tree.map_paths(lambda path, label: label if label == FROZEN else _group(path, label, flat),
                              method.labels(params))

    def prepare(*args: Any, **kwargs: Any) -> Method:
        return _grouped(again(*args, **kwargs))

    return method._replace(labels=labels, prepare=prepare if again else None)


def _group(path: str, label: str, flat: Mapping[str, Any]) -> str:
    folder, _, name = path.rpartition("/")
    if name in KEYS and f"{folder}/embedding" in flat:
        return "lora_embedding"
    return "lora_b" if name == "lora_b" or name in VECTORS else label


SHOWN = {"arguments": {"r": 16, "lora_alpha": 32}}  # in tables and benchmarks
