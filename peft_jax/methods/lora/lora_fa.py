"""LoRA-FA, LoRA with A frozen (arXiv 2308.03303, section 3.1): only B trains.

    y = x W + s (drop(x) A) B

A's random start decides once and for all which r directions of the input are seen; B, zero at first, has half the
parameters of LoRA or less, and its gradient needs x A alone instead of x. The stored adapter is a LoRA's, A included.
peft's ``create_lorafa_optimizer`` freezes A as well, and also multiplies B's gradient by (A A^T)^-1 / s^2 before Adam,
which the paper's first version and this file do not.
"""

from functools import partial
from inspect import signature

from peft_jax.method import Method
from peft_jax.methods.lora.lora import FORMAT as LORA
from peft_jax.methods.lora.lora import labels, lora, padding, trains
from peft_jax.methods.lora.peft_file import slots


def lorafa(*args, **kwargs) -> Method:
    """LoRA-FA: the arguments of :func:`peft_jax.lora`. What was saved loads as a LoRA, whose A trains.

    >>> method = lorafa(r=4, target_modules=("up_proj",))
    >>> params = method.init(jax.random.key(0), {"up_proj": {"kernel": jnp.ones((6, 8))}})
    >>> method.labels(params)["up_proj"]
    {'kernel': 'frozen', 'lora_a': 'frozen', 'lora_b': 'trainable', 'lora_scaling': 'frozen'}

    Raises ``PeftJaxError`` as ``lora`` does.
    """
    return _frozen(lora(*args, **kwargs))


lorafa.__signature__ = signature(lora)


def _frozen(method: Method) -> Method:
    """A LoRA without training of A, which its file holds nevertheless."""

    def prepare(*args, **kwargs):
        return _frozen(method.prepare(*args, **kwargs))

    return method._replace(labels=partial(labels, partial(_trains, method.config)), stored=FORMAT,
                           padding=partial(_padding, method.config), prepare=prepare if method.prepare else None)


def _trains(config, path, flat) -> bool:
    return path.rpartition("/")[2] != "lora_a" and trains(config, path, flat)


def _padding(config, params) -> int:
    return padding(config, params, ("lora_b",))


def _slots(config, flat, trained, naming):
    kept = [path for path in flat if path in trained or path.rpartition("/")[2] == "lora_a"]
    return slots(config, flat, kept, naming)


# What was saved loads as a LoRA: no file is claimed.
FORMAT = LORA._replace(make=lorafa, slots=_slots, claims=lambda given: False)
