"""Write an adapter as Hugging Face peft stores it: ``adapter_config.json``, ``adapter_model.safetensors``.

What is in the files is each method's own matter (:mod:`peft_jax.core.peft_format`). Here: files, names, checks.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax.core import arguments, files, targeting, tree
from peft_jax.core.peft_format import Naming, Slot
from peft_jax.core.tree import check_method_leaves
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download
from peft_jax.hub.adapters import config as adapter_config
from peft_jax.hub.adapters.naming import CONFIG, PLAIN_LEAVES, WEIGHTS, family_of, naming_of, trained_leaves
from peft_jax.hub.families.family import Family, table_of
from peft_jax.method import Method, owns
from peft_jax.methods.soft_prompt import virtual_tokens

_OF_HEADS = ("embedding", "lora_a", "lora_b")  # which change a tied head with the embedding


def save_adapter(folder: str | os.PathLike, method: Method, model: Any, params: Mapping[str, Any],
                 base_model: str | None = None) -> None:
    """Write the trained part of ``params`` as the two files of a peft adapter.

    Args:
      folder: made where missing; files are written aside and then renamed.
      method: any method but a plain full one; a chain is one file that lists its methods, which only this library
        reads, unless one alone of them is stored.
      model: the model the parameters are of, ``None`` counts as one that is not ours. Real peft reads the files of a
        model of :mod:`peft_jax.models`.
      params: the whole tree; leaves are stored in their own dtype.
      base_model: where the base model is from, as of :func:`peft_jax.load_pretrained`. It is written as peft's
        AutoPeftModel and others find it: a Hub id or a whole path, a Hub id for ``pypi:`` assets, too.

    Raises:
      PeftJaxError: a method that is not stored, leaves that are neither its own nor the model's (of models that are
        not ours nobody can tell, and other methods' frozen leaves are left out), trained leaves that the file has no
        place for, a tied embedding that peft would not keep tied, or a folder that cannot be written.
    """
    arguments.check("save_adapter", {"folder": folder, "method": method, "model": model, "params": params},
                    optional=("model",))
    check_method_leaves(method, params)
    base_model = base_model and download.name_elsewhere(base_model)
    parts, family = method.parts or (method,), family_of(model)
    _check_stored(method, parts, params)
    _check_own(method, params, family)
    configs, tensors = [], {}
    for part, form in [(part, part.stored) for part in parts if part.stored is not None]:
        config, flat = form.plain(part.config, tree.flatten(params))
        naming = naming_of(flat, None, family)._replace(heads=family and model.config.num_attention_heads)
        slots = form.slots(config, flat, trained_leaves(part, params, flat), naming)
        if double := slots.keys() & tensors.keys():
            raise PeftJaxError(f"save_adapter: two methods of the chain both store '{min(double)}'.")
        tensors |= _tensors(slots, flat)
        configs.append(adapter_config.write(form, config, flat, naming, tied=_tied(slots, naming),
                                            base_model=base_model, task_type=_task_type(family, model, config, slots),
                                            classes=_classes(family, model)))
    if not configs:
        raise PeftJaxError("save_adapter: no method of the chain has an adapter file, and none of its leaves trains: "
                           "there is nothing to save.")
    _write(Path(folder), tensors, configs[0] if len(configs) == 1 else {"peft_type": "CHAIN", "methods": configs})


def _check_stored(method: Method, parts, params) -> None:
    """Raise ``PeftJaxError`` where a part has no file, or its leaves are no adapter of a base that others have."""
    instead = "save the whole model with save_pretrained(folder, model, method.merge(params)) instead."
    for part in parts:
        if part.stored is None and (part is method or trained_leaves(part, params, tree.flatten(params))):
            raise PeftJaxError(f"save_adapter: {part.config['peft_type']} has no adapter file: {instead}")
    if why := _refused(parts, params):
        raise PeftJaxError(f"save_adapter: {why}: {instead}")


def _check_own(method: Method, params, family: Family | None) -> None:
    """Of a model whose leaves are known, the error for a leaf that is neither one of them nor the method's own."""
    flat = tree.flatten(params)
    modules = () if family is None else table_of(family, flat)
    odd = [path for path in flat if family and not owns(method.leaves, path) and
           not (path.rpartition("/")[0] in modules and path.rpartition("/")[2] in PLAIN_LEAVES)]
    if odd:
        raise PeftJaxError(f"save_adapter: '{odd[0]}' (of {len(odd)} such leaves) is neither the model's nor of "
                           f"{method.config['peft_type']}, and would be lost: save with the method that made the "
                           "parameters.")


def is_stored(method: Method, params: Mapping[str, Any]) -> bool:
    """Whether ``params`` have an adapter file; of a plain full method the whole model is saved instead."""
    parts = method.parts or (method,)
    return any(part.stored is not None for part in parts) and not _refused(parts, params)


def _refused(parts, params) -> str:
    """Why the parameters are no adapter of a base that others have, "" where they are one."""
    flat = tree.flatten(params)
    reasons = [part.stored.unsavable_because(part.config, flat) for part in parts if part.stored]
    return next(filter(None, reasons), "")


def _tied(slots: Mapping[str, Slot], naming: Naming) -> str:
    """The embedding that is the head as well, where it trains or has a LoRA; "" where there is no such."""
    changed = (slot.path.rpartition("/") for slot in slots.values())
    return next((folder for folder, _, leaf in changed if folder in naming.tied and leaf in _OF_HEADS), "")


def _tensors(slots: Mapping[str, Slot], flat) -> dict[str, np.ndarray]:
    leaves = {path: np.asarray(flat[path]) for path in dict.fromkeys(slot.path for slot in slots.values())}
    return {key: slot.tensor(leaves[slot.path]) for key, slot in slots.items()}


def _classes(family: Family | None, model: Any) -> tuple[str, ...]:
    """What the classes of the model's head are called; () where it has none, or they have numbers alone."""
    return model.config.head.labels if family and family.heads and model.config.head else ()


def _task_type(family: Family | None, model: Any, config, slots) -> str | None:
    """What peft calls the model's task, by which it chooses the class around it. That of a classifier wants the head
    in the file; the one for no task opens what has none, and would leave virtual tokens out, which it must not."""
    if family is None or not family.heads:
        return family and "CAUSAL_LM"
    if model.config.head is None:
        return "FEATURE_EXTRACTION"
    whole = all(targeting.saved(config.get("modules_to_save"), head) for head in family.heads)
    return model.config.head.task_type if whole or virtual_tokens.KEY in slots else None


def _write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    with files.written_aside(folder, "adapter", last=CONFIG) as scratch:
        Path(scratch, CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, Path(scratch, WEIGHTS), metadata={"format": "pt"})
