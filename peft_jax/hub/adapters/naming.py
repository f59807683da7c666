"""What adapter files call a model's modules: of our own models Hugging Face's names, of others dotted paths."""

from functools import partial
from typing import Any

import numpy as np

from peft_jax.core import kernel_axes, targeting, tree
from peft_jax.core.peft_format import PREFIX, Naming, Slot
from peft_jax.hub import families
from peft_jax.hub.families import hf_names
from peft_jax.hub.families.family import Family, table_of
from peft_jax.method import FROZEN, Method

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN_LEAVES = ("kernel", "bias", "scale", "embedding")  # what Flax's own modules call their leaves


def trained_leaves(method: Method, params, flat) -> list[str]:
    """The trained leaves among those to be stored; what ``plain`` put in the place of others counts as trained."""
    labels = tree.flatten(method.labels(params))
    return [path for path in flat if path not in labels or labels[path] != FROZEN]


def family_of(model: Any) -> Family | None:
    """The family of one of our own models, ``None`` of any other."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = families.KINDS.get(kind) if isinstance(kind, str) else None
    own = family is not None and isinstance(family.model, type) and isinstance(model, family.model)
    return family if own else None


def family_with(params, tensors) -> Family | None:
    """The family that has all modules of ``params``; of several the one whose prefix the file's tensors have."""
    modules = {path.rpartition("/")[0] for path in tree.flatten(params)}
    fitting = [family for family in families.FAMILIES if modules <= family.modules.keys()]
    named = [family for family in fitting if any(key.startswith(PREFIX + family.prefix) for key in tensors)]
    return next(iter((*named, *fitting)), None)


def naming_of(flat, axes, family: Family | None) -> Naming:
    table, pairs = family and table_of(family, flat), {holder: [] for holder in kernel_axes.HOLDERS}
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name in pairs:
            stack = axes[path].stack if axes and path in axes else kernel_axes.plain_axes(leaf.shape).stack
            pairs[name] += zip(targeting.module_names(module, stack), _module_names(table, module, stack))
    owners = [pair for module, stack in targeting.stacks(flat, axes).items() if table is None or module in table
              for pair in zip(targeting.module_names(module, stack), _module_names(table, module, stack))]
    sideways = any(module.leaf == "kernel" and not module.transposed for module in (table or {}).values())
    tied = {family.tied.rpartition("/")[0]: "lm_head"} if family and family.tied and _follows(family, flat) else {}
    return Naming(partial(_module_names, table), partial(_whole, family, table, flat), pairs["kernel"],
                  family is not None, sideways, owners, pairs["embedding"], tied)


def _follows(family: Family, flat) -> bool:
    """Whether the model's head is its embedding."""
    return family.tied is not None and "lm_head/kernel" not in flat


def _module_names(table: hf_names.Table | None, module: str, stack: tuple[int, ...]) -> list[str]:
    if table is None:
        return list(targeting.module_names(module, stack))
    return [hf_names.hf_module(table, module, layer) for layer in (range(*stack) if stack else [None])]


def _whole(family: Family | None, table: hf_names.Table | None, flat, path: str) -> dict[str, Slot]:
    """The tensors of a leaf that trains as a whole, by name."""
    if family is None or table is None:
        return {path.replace("/", "."): Slot(path)}
    places = hf_names.tensors(table, [path], flat[path].shape[0])
    slots = {name: Slot(path, partial(_part, place)) for name, place in places.items()}
    if path == family.tied and _follows(family, flat):  # tied: peft stores it under both names
        slots["lm_head.weight"] = Slot(path)
    return slots


def _part(place: hf_names.Place, leaf: np.ndarray) -> np.ndarray:
    """The tensor of a place, a view of the leaf."""
    part = leaf if place.layer is None else leaf[place.layer]
    return part.T if place.transposed else part


def model_tensors(family: Family | None, base) -> dict[str, Slot]:
    """Every tensor of the plain model by its name, {} where the model is not ours."""
    table = family and table_of(family, base)
    return {name: slot for path in base if family for name, slot in _whole(family, table, base, path).items()}
