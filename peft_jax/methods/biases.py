"""Which biases train, by peft's argument ``bias``: "none", "all", or those of adapted modules ("lora_only", ...)."""

from collections.abc import Mapping
from typing import Any

from peft_jax import beside, targets
from peft_jax.errors import PeftJaxError

OF_LORA = ("none", "all", "lora_only")


def trains(config: Mapping[str, Any], path: str, flat: Mapping[str, Any], switch: str) -> bool:
    """Whether the leaf at ``path`` is a bias that trains; ``switch`` is a leaf that every adapted module holds."""
    folder, _, name = path.rpartition("/")
    adapted = f"{folder}/{switch}".lstrip("/") in flat
    return name == "bias" and (config["bias"] == "all" or (config["bias"].endswith("_only") and adapted))


def check(config: Mapping[str, Any], flat: Mapping[str, Any], switch: str) -> None:
    """A stacked bias leaf trains as a whole; peft's "_only" on some layers of a stack would need a part of it.

    ``switch`` is the frozen leaf (*stack) of every adapted module.
    """
    for folder in beside.folders(flat, switch) if config["bias"].endswith("_only") else ():
        names = targets.module_names(folder.rstrip("/"), flat[folder + switch].shape)
        if f"{folder}bias" in flat and not beside.chosen(config, names).all():
            raise PeftJaxError(f"bias='{config['bias']}' on some layers of a scanned stack ('{folder}bias') is not "
                               "supported: adapt all layers, or set bias to 'none' or 'all'.")
