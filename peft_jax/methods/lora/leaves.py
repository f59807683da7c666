"""The leaves of a trained LoRA, checked against the base that they are to change: for mixing and combining adapters."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from peft_jax.core import tree
from peft_jax.core.kernel_axes import HOLDERS
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods import _kernel_adapter as kernel_adapter
from peft_jax.methods.lora.peft_file import LEAVES, as_plain
from peft_jax.parallel.mesh import fetch

Leaves = dict[str, list[np.ndarray]]


def check_pair(pair: Any, what: str) -> None:
    """Raise ``PeftJaxError``, about ``what``, where ``pair`` is no (method, params)."""
    fits = isinstance(pair, tuple | list) and not isinstance(pair, Method) and len(pair) == 2
    if not fits or not isinstance(pair[0], Method) or not isinstance(pair[1], Mapping):
        raise PeftJaxError(f"{what} is no (method, params): give what load_adapter or method and method.init made.")


def on_base(method: Method, params: Mapping[str, Any], base: Mapping[str, Any], what: str) -> tuple[dict, Leaves]:
    """The config and ``{folder of a module: [a, b, scaling]}`` of ``params`` as a plain LoRA on the base as it was.

    Args:
      base: the plain model's parameters.
      what: the adapter, for errors.

    Raises:
      PeftJaxError: another method, leaves of the base that train too, no or not all leaves of the method, a module
        that the base lacks, or one of another size there.
    """
    whole = tree.flatten(params)
    absent = [folder + leaf for folder in kernel_adapter.folders(whole, LEAVES[0]) for leaf in LEAVES
              if folder + leaf not in whole]
    if absent:
        raise PeftJaxError(f"{what} has params without '{absent[0]}': give the whole tree, combine(frozen, trainable).")
    config, flat = as_plain(method, params, what)
    modules = {folder: [fetch(flat[folder + leaf]) for leaf in LEAVES]
               for folder in kernel_adapter.folders(flat, LEAVES[0])}
    if not modules:
        raise PeftJaxError(f"{what} has params without '{LEAVES[0]}' leaves: give the tree that method.init or "
                           "load_adapter made.")
    under = tree.flatten(base)
    for folder, leaves in modules.items():
        _check_size(what, folder, leaves, under)
    return config, modules


def _check_size(what: str, folder: str, leaves: list[np.ndarray], under: Mapping[str, Any]) -> None:
    a, b, scaling = leaves
    kernel = next((under[folder + holder] for holder in HOLDERS if folder + holder in under), None)
    if kernel is None:
        hint = (" The head is tied to the embedding: give peft_jax.untie(base_params)." if folder == "lm_head/" else
                " Give the parameters of the model that it was made on.")
        raise PeftJaxError(f"{what} changes '{folder}kernel', which base_params lack.{hint}")
    sizes = (*a.shape[:-1], *b.shape[scaling.ndim + 1:])
    if sizes != kernel.shape:
        raise PeftJaxError(f"{what} changes '{folder}kernel' of {sizes}, in base_params it is {kernel.shape}: give the "
                           "parameters of the model that it was made on.")
