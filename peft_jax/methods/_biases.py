"""Which biases train, by peft's argument ``bias``: "none", "all", or those of adapted modules ("lora_only", ...)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from peft_jax.core import targeting, tree
from peft_jax.errors import PeftJaxError
from peft_jax.methods import _kernel_adapter as kernel_adapter

OF_LORA = ("none", "all", "lora_only")


def trains(config: Mapping[str, Any], leaves: Sequence[str], switch: str, path: str, flat: Mapping[str, Any]) -> bool:
    """Whether the leaf at ``path`` trains: a bias that is meant, or as of ``_kernel_adapter.trains``.

    ``switch`` is the frozen leaf (*stack) of every adapted module.
    """
    folder, _, name = path.rpartition("/")
    adapted = f"{folder}/{switch}".lstrip("/") in flat
    if name == "bias" and (config["bias"] == "all" or (config["bias"].endswith("_only") and adapted)):
        return True
    return kernel_adapter.trains(config, leaves, path, flat)


def init(config, leaves: Callable[..., Mapping[str, jax.Array]], trains: Callable[[str, Mapping], bool], switch: str,
         rng, params, axes=None, **options) -> tree.Tree:
    """As ``_kernel_adapter.init``, which has the other ``options``, with ``bias`` checked against the stacks."""
    params = kernel_adapter.init(config, leaves, trains, rng, params, axes, **options)
    _check(config, tree.flatten(params), switch)
    return params


def _check(config: Mapping[str, Any], flat: Mapping[str, Any], switch: str) -> None:
    """A stacked bias leaf trains as a whole; peft's "_only" on some layers of a stack would need a part of it."""
    for folder in kernel_adapter.folders(flat, switch) if config["bias"].endswith("_only") else ():
        names = targeting.module_names(folder.rstrip("/"), flat[folder + switch].shape)
        if f"{folder}bias" in flat and not kernel_adapter.chosen(config, names).all():
            raise PeftJaxError(f"bias='{config['bias']}' on some layers of a scanned stack ('{folder}bias') is not "
                               "supported: adapt all layers, or set bias to 'none' or 'all'.")
