"""Read an adapter that is stored as Hugging Face peft stores it, from a folder or the Hub."""

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from peft_jax.core import arguments, kernel_axes, labels, targeting, tree
from peft_jax.core.files import expanded
from peft_jax.core.peft_format import PREFIX
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download
from peft_jax.hub.adapters import config as adapter_config
from peft_jax.hub.adapters import tensors as adapter_tensors
from peft_jax.hub.adapters.naming import (
    CONFIG,
    PLAIN_LEAVES,
    WEIGHTS,
    family_with,
    model_tensors,
    naming_of,
    trained_leaves,
)
from peft_jax.hub.families.family import Family
from peft_jax.hub.formats import safetensors_files
from peft_jax.method import Method, chain
from peft_jax.methods import formats
from peft_jax.models import untie


def load_adapter(source: str | os.PathLike, base_params: Mapping[str, Any],
                 axes: Mapping[str, kernel_axes.KernelAxes] | None = None) -> tuple[Method, dict[str, Any]]:
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
    arguments.check("load_adapter", {"source": source, "base_params": base_params})
    folder = _folder(source)
    parts = adapter_config.read(folder / CONFIG, formats())
    tensors = safetensors_files.tensors_of(folder / WEIGHTS)
    family, params = family_with(base_params, tensors), base_params
    if _unties(family, parts, tensors):
        params = base_params = untie(base_params)
    methods, slots, flat = [], {}, tree.flatten(params)
    for part in parts:
        flat = tree.flatten(params)
        naming = naming_of(flat, axes, family)
        owners = [ours for ours, _ in naming.owners]
        modules = [path.rpartition("/")[0].replace("/", ".") for path in flat]
        method = adapter_config.method_of(part, owners, modules)
        params = _with_leaves(method, params, axes, folder, tensors)
        flat = tree.flatten(params)
        trained, naming = trained_leaves(method, params, flat), naming_of(flat, axes, family)
        slots |= part.format.slots(method.config, flat, trained, naming)
        methods.append(method)
    base = tree.flatten(base_params)
    adapter_tensors.check(folder, tensors, slots, flat, model_tensors(family, base), base)
    params = tree.unflatten(flat | adapter_tensors.leaves_of(folder, tensors, slots, flat, base))
    return methods[0] if len(methods) == 1 else chain(*methods), params


def adapter_classes(source: str | os.PathLike) -> tuple[str, ...]:
    """What the classes of a stored adapter's head are called, by number; () where its config does not say."""
    parts = adapter_config.parts_of(_folder(source) / CONFIG)
    return next(filter(None, (labels.names(part.get("id2label")) for part in parts)), ())


def _with_leaves(method: Method, params, axes, folder: Path, tensors) -> dict[str, Any]:
    """``method.init``; where that fails on a tree that is perhaps no plain model's, the error says so."""
    odd = [path for path in tree.flatten(params) if path.rpartition("/")[2] not in PLAIN_LEAVES]
    init = partial(method.init, jax.random.key(0), params, axes=axes)
    try:
        adapter_tensors.check_sizes(method, init, folder, tensors, params)
        return init()
    except PeftJaxError as error:
        if not odd:
            raise
        raise PeftJaxError(f"{error} load_adapter wants the plain model's base_params, as load_pretrained gives them, "
                           f"and these have '{odd[0]}'.") from error


def _folder(source: str | os.PathLike) -> Path:
    folder = expanded(source)
    if not os.path.exists(folder) and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", os.fspath(source)):
        folder = download.from_hub(os.fspath(source), [CONFIG, WEIGHTS])
    absent = [name for name in (CONFIG, WEIGHTS) if not os.path.lexists(folder / name)]
    pickled = " (a .bin file is a pickle, which can run code: save it from peft as safetensors)"
    inside = f"; '{folder / 'adapter'}' does" if os.path.isfile(folder / "adapter" / CONFIG) else ""
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
    return bool(own) or any(targeting.saved(part.arguments.get("modules_to_save"), name) for part in parts
                            for name in ("lm_head", embedding))
