"""Adapters as Hugging Face peft stores them, in and out: ``adapter_config.json``, ``adapter_model.safetensors``.

What is in the files is each method's own matter (:mod:`peft_jax.stored`). Here: files, names, checks. Modules of our
own models have Hugging Face's names; those of other models their dotted Flax paths, and leaves that train as a whole
are then stored as they are, under their path.
"""

import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peft_jax import targets, tree, virtual
from peft_jax.errors import PeftJaxError
from peft_jax.hub import adapter_config, adapter_tensors, assets, families, files, names, weights
from peft_jax.hub.family import Family, table_of
from peft_jax.method import FROZEN, Method, chain, check_held, owns
from peft_jax.methods import FORMATS
from peft_jax.models import untie
from peft_jax.stored import PREFIX, Naming, Slot

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OF_HEADS = ("embedding", "lora_a", "lora_b")  # which change a tied head with the embedding
_PLAIN = ("kernel", "bias", "scale", "embedding")  # what Flax's own modules call their leaves


def save_adapter(folder: str | os.PathLike, method: Method, params: Mapping[str, Any], model: Any,
                 base_model: str | None = None) -> None:
    """Write the trained part of ``params`` as the two files of a peft adapter.

    Args:
      folder: made where missing; files are written aside and then renamed.
      method: any method but a plain full one; a chain is one file that lists its methods, which only this library
        reads, unless one alone of them is stored.
      params: the whole tree; leaves are stored in their own dtype.
      model: the model the parameters are of. For a model of :mod:`peft_jax.models` real peft reads the files.
      base_model: Hub id or path of the base model, which peft's AutoPeftModel and others look for.

    Raises:
      PeftJaxError: a method that is not stored, leaves that are neither its own nor the model's (of models that are
        not ours nobody can tell, and other methods' frozen leaves are left out), trained leaves that the file has no
        place for, a tied embedding that peft would not keep tied, or a folder that cannot be written.
    """
    check_held(method, params)
    parts, family = method.parts or (method,), _family_of(model)
    for part in parts:
        if part.stored is None and (part is method or _trained(part, params, tree.flatten(params))):
            raise PeftJaxError(f"save_adapter: {part.config['peft_type']} has no adapter file: save the whole model "
                               "with save_pretrained(folder, model, method.merge(params)) instead.")
    if why := _refused(parts, params):
        raise PeftJaxError(f"save_adapter: {why}: save the whole model with save_pretrained(folder, model, "
                           "method.merge(params)) instead.")
    _check_own(method, params, family)
    stated, tensors = [], {}
    for part in [part for part in parts if part.stored is not None]:
        config, flat = part.stored.plain(part.config, tree.flatten(params))
        naming = _naming(flat, None, family)._replace(heads=family and model.config.num_attention_heads)
        slots = part.stored.slots(config, flat, _trained(part, params, flat), naming)
        if double := slots.keys() & tensors.keys():
            raise PeftJaxError(f"save_adapter: two methods of the chain both store '{min(double)}'.")
        tensors |= _tensors(slots, flat)
        stated.append(adapter_config.write(part.stored, config, flat, naming, tied=_tied(slots, naming),
                                           base_model=base_model, task_type=_task_type(family, model, config, slots)))
    if not stated:
        raise PeftJaxError("save_adapter: no method of the chain has an adapter file, and none of its leaves trains: "
                           "there is nothing to save.")
    _write(Path(folder), tensors, stated[0] if len(stated) == 1 else {"peft_type": "CHAIN", "methods": stated})


def _check_own(method: Method, params, family: Family | None) -> None:
    """Of a model whose leaves are known, the error for a leaf that is neither one of them nor the method's own."""
    flat = tree.flatten(params)
    table = family and table_of(family, flat)
    odd = [path for path in flat if family and not owns(method.leaves, path) and
           not (path.rpartition("/")[0] in table and path.rpartition("/")[2] in _PLAIN)]
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
    return next((why for part in parts if part.stored and (why := part.stored.refuses(part.config, flat))), "")


def _trained(method: Method, params, flat) -> list[str]:
    """The trained leaves among those to be stored; what ``plain`` put in the place of others counts as trained."""
    labels = tree.flatten(method.labels(params))
    return [path for path in flat if path not in labels or labels[path] != FROZEN]


def _tied(slots: Mapping[str, Slot], naming: Naming) -> str:
    """The embedding that is the head as well, where it trains or has a LoRA; "" where there is no such."""
    changed = (slot.path.rpartition("/") for slot in slots.values())
    return next((folder for folder, _, leaf in changed if folder in naming.tied and leaf in _OF_HEADS), "")


def _tensors(slots: Mapping[str, Slot], flat) -> dict[str, np.ndarray]:
    leaves = {path: np.asarray(flat[path]) for path in dict.fromkeys(slot.path for slot in slots.values())}
    return {key: slot.tensor(leaves[slot.path]) for key, slot in slots.items()}


def load_adapter(source: str | os.PathLike, base_params: Mapping[str, Any],
                 axes: Mapping[str, targets.KernelAxes] | None = None) -> tuple[Method, dict[str, Any]]:
    """A stored adapter's method, and ``base_params`` with the adapter in them.

    Where the adapter has a head of its own, or an embedding beside a head that stays, a tied model is untied, as peft
    does. Leaves are float32. Base leaves that the adapter does not replace are not copied.

    Args:
      source: a local folder, or a Hub id (``org/name``), of which only the two files are fetched.
      base_params: of the model that the adapter was made on; quantised likewise if that was, as the base of an adapter
        that began as LoftQ's always is: the file does not say so, here or in peft.
      axes: from :func:`peft_jax.kernel_axes`, for a model that is not ours.

    Raises:
      PeftJaxError: no such adapter, a pickle, a field of the config that is not supported, or tensors that are
        missing, unexpected or of another shape; all of them are listed.
    """
    folder = _folder(source)
    parts = adapter_config.read(folder / CONFIG, FORMATS)
    tensors = weights.read_all(folder / WEIGHTS)
    family, params = _family_with(base_params, tensors), base_params
    if _unties(family, parts, tensors):
        params = base_params = untie(base_params)
    methods, slots = [], {}
    for part in parts:
        flat = tree.flatten(params)
        naming = _naming(flat, axes, family)
        owners = [ours for ours, _ in naming.owners]
        modules = [path.rpartition("/")[0].replace("/", ".") for path in flat]
        method = adapter_config.made(part, owners, modules)
        params = _with_leaves(method, params, axes, folder, tensors)
        flat = tree.flatten(params)
        slots |= part.format.slots(method.config, flat, _trained(method, params, flat), _naming(flat, axes, family))
        methods.append(method)
    base = tree.flatten(base_params)
    adapter_tensors.check(folder, tensors, slots, flat, _named(family, base), base)
    params = tree.unflatten(flat | adapter_tensors.filled(tensors, slots, flat))
    return methods[0] if len(methods) == 1 else chain(*methods), params


def _with_leaves(method: Method, params, axes, folder: Path, tensors) -> dict[str, Any]:
    """``method.init``; where that fails on a tree that is perhaps no plain model's, the error says so."""
    odd = [path for path in tree.flatten(params) if path.rpartition("/")[2] not in _PLAIN]
    init = partial(method.init, jax.random.key(0), params, axes=axes)
    try:
        adapter_tensors.check_sizes(method, init, folder, tensors)
        return init()
    except PeftJaxError as error:
        if not odd:
            raise
        raise PeftJaxError(f"{error} load_adapter wants the plain model's base_params, as load_pretrained gives them, "
                           f"and these have '{odd[0]}'.") from error


def _family_of(model: Any) -> Family | None:
    """The family of one of our own models, ``None`` of any other."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = families.KINDS.get(kind)
    return family if family and isinstance(model, family.model) else None


def _task_type(family: Family | None, model: Any, config, slots) -> str | None:
    """What peft calls the model's task, by which it chooses the class around it. That of a classifier wants the head
    in the file; the one for no task opens what has none, and would leave virtual tokens out, which it must not."""
    if family is None or not family.heads:
        return family and "CAUSAL_LM"
    if model.config.head is None:
        return "FEATURE_EXTRACTION"
    whole = all(targets.saved(config.get("modules_to_save"), head) for head in family.heads)
    return model.config.head.task_type if whole or virtual.KEY in slots else None


def _family_with(params, tensors) -> Family | None:
    """The family that has all modules of ``params``; of several the one whose prefix the file's tensors have."""
    modules = {path.rpartition("/")[0] for path in tree.flatten(params)}
    fitting = [family for family in families.FAMILIES if modules <= family.modules.keys()]
    named = [family for family in fitting if any(key.startswith(PREFIX + family.prefix) for key in tensors)]
    return next(iter((*named, *fitting)), None)


def _naming(flat, axes, family: Family | None) -> Naming:
    table, pairs = family and table_of(family, flat), {holder: [] for holder in targets.HOLDERS}
    for path, leaf in flat.items():
        module, _, name = path.rpartition("/")
        if name in pairs:
            stack = axes[path].stack if axes and path in axes else targets.plain_axes(leaf.shape).stack
            pairs[name] += zip(targets.module_names(module, stack), _module_names(table, module, stack))
    owners = [pair for module, stack in targets.stacks(flat, axes).items() if table is None or module in table
              for pair in zip(targets.module_names(module, stack), _module_names(table, module, stack))]
    sideways = any(module.leaf == "kernel" and not module.transposed for module in (table or {}).values())
    tied = {family.tied.rpartition("/")[0]: "lm_head"} if family and _follows(family, flat) else {}
    return Naming(partial(_module_names, table), partial(_whole, family, table, flat), pairs["kernel"],
                  family is not None, sideways, owners, pairs["embedding"], tied)


def _follows(family: Family, flat) -> bool:
    """Whether the model's head is its embedding."""
    return family.tied is not None and "lm_head/kernel" not in flat


def _module_names(table: names.Table | None, module: str, stack: tuple[int, ...]) -> list[str]:
    if table is None:
        return list(targets.module_names(module, stack))
    return [names.hf_module(table, module, layer) for layer in (range(*stack) if stack else [None])]


def _whole(family: Family | None, table: names.Table | None, flat, path: str) -> dict[str, Slot]:
    """The tensors of a leaf that trains as a whole, by name."""
    if table is None:
        return {path.replace("/", "."): Slot(path)}
    placed = names.tensors(table, [path], flat[path].shape[0])
    found = {name: Slot(path, partial(_part, place)) for name, place in placed.items()}
    if path == family.tied and _follows(family, flat):  # tied: peft stores it under both names
        found["lm_head.weight"] = Slot(path)
    return found


def _part(place: names.Place, leaf: np.ndarray) -> np.ndarray:
    """The tensor of a place, a view of the leaf."""
    part = leaf if place.layer is None else leaf[place.layer]
    return part.T if place.transposed else part


def _named(family: Family | None, base) -> dict[str, Slot]:
    """Every tensor of the plain model by its name, {} where the model is not ours."""
    table = family and table_of(family, base)
    return {name: slot for path in base if family for name, slot in _whole(family, table, base, path).items()}


def _write(folder: Path, tensors: dict[str, np.ndarray], stated: dict[str, Any]) -> None:
    from safetensors.numpy import save_file

    with files.written_aside(folder, "adapter", last=CONFIG) as scratch:
        Path(scratch, CONFIG).write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, Path(scratch, WEIGHTS), metadata={"format": "pt"})


def _folder(source: str | os.PathLike) -> Path:
    folder = Path(source).expanduser()
    if not folder.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", os.fspath(source)):
        folder = assets.from_hub(os.fspath(source), [CONFIG, WEIGHTS])
    absent = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    pickled = " (a .bin file is a pickle, which can run code: save it from peft as safetensors)"
    inside = f"; '{folder / 'adapter'}' does" if (folder / "adapter" / CONFIG).is_file() else ""
    if absent:
        raise PeftJaxError(f"{folder} has no {' and no '.join(absent)}: it holds no adapter that can be read{inside}"
                           f"{pickled if WEIGHTS in absent else ''}.")
    return folder


def _unties(family: Family | None, parts, tensors) -> bool:
    """Whether peft gives a tied model a head of its own for this adapter; one that follows the embedding is none."""
    if family is None or family.tied is None or any(part.tied for part in parts):
        return False
    embedding, head = family.tied.rpartition("/")[0], f"{PREFIX}lm_head."
    followed = f"{PREFIX}{family.modules[embedding].name}."
    own = [key for key in tensors if key.startswith(f"{followed}lora_embedding_") or (
        key.startswith(head) and key not in adapter_tensors.TIED and key.replace(head, followed) not in tensors)]
    return bool(own) or any(targets.saved(part.stated.get("modules_to_save"), name) for part in parts
                            for name in ("lm_head", embedding))
