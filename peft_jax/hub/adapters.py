"""LoRA adapters as Hugging Face peft stores them, in and out: ``adapter_config.json``, ``adapter_model.safetensors``.

A stacked leaf is split into its layers and cut to each layer's own rank on the way out, put together and filled with
zeros on the way in. Modules of our own models have Hugging Face's names; those of other models their dotted Flax paths,
and leaves that train as a whole are then stored as they are, under their path.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import targets, tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub import adapter_config, assets, files, names
from peft_jax.method import FROZEN, Method
from peft_jax.methods.lora import lora, ranks, scalings
from peft_jax.models.llama import CausalLM, untie

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's two wrappers around the model
_KEYS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


class Slot(NamedTuple):
    """Where one tensor of the file lies here: a leaf, an entry of its stack, the rank used of it, torch's (out, in)."""

    path: str
    entry: tuple[int, ...]
    rank: int | None
    transposed: bool

    def of(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor as a view of its leaf, in the file's layout: lora_A (r, in), lora_B (out, r)."""
        part = leaf[self.entry]
        if self.path.endswith("lora_a"):
            part = part.reshape(-1, part.shape[-1])[:, :self.rank]
        elif self.path.endswith("lora_b"):
            part = part.reshape(part.shape[0], -1)[:self.rank]
        return part.T if self.transposed else part


def save_adapter(folder: str | os.PathLike, method: Method, params: Mapping[str, Any], model: Any,
                 base_model: str | None = None) -> None:
    """Write the trained part of ``params`` as the two files of a peft adapter.

    Args:
      folder: made where missing; files are written aside and then renamed.
      method: ``lora(...)``, or a chain with one such in it.
      params: the whole tree; leaves are stored in their own dtype.
      model: the model the parameters are of. For a :class:`CausalLM` real peft reads the files.
      base_model: Hub id or path of the base model, which peft's AutoPeftModel and others look for.

    Raises:
      PeftJaxError: a method that is no LoRA, scales that are not its own, trained leaves that peft has no place for,
        or a folder that cannot be written.
    """
    config = _lora_config(method)
    causal, flat = isinstance(model, CausalLM), tree.flatten(params)
    labels = tree.flatten(method.labels(params))
    slots = _slots(config, flat, [path for path in flat if labels[path] != FROZEN], causal)
    _check_scales(config, flat)
    leaves = {path: np.asarray(flat[path]) for path in dict.fromkeys(slot.path for slot in slots.values())}
    tensors = {key: np.ascontiguousarray(slot.of(leaves[slot.path])) for key, slot in slots.items()}
    tied = causal and "embed_tokens/embedding" in leaves and "lm_head/kernel" not in flat
    stated = adapter_config.write(config, _modules(flat, None, causal), causal=causal, tied=tied, base_model=base_model)
    _write(Path(folder), tensors, stated)


def load_adapter(source: str | os.PathLike, base_params: Mapping[str, Any],
                 axes: Mapping[str, targets.KernelAxes] | None = None) -> tuple[Method, dict[str, Any]]:
    """A stored adapter's method, and ``base_params`` with the adapter in them.

    Where the adapter has a head of its own, or an embedding beside a head that stays, a tied model is untied, as peft
    does. Leaves are float32. Base leaves that the adapter does not replace are not copied.

    Args:
      source: a local folder, or a Hub id (``org/name``), of which only the two files are fetched.
      base_params: of the model that the adapter was made on.
      axes: from :func:`peft_jax.kernel_axes`, for a model that is not ours.

    Raises:
      PeftJaxError: no such adapter, a pickle, a field of the config that is not supported, or tensors that are
        missing, unexpected or of another shape; all of them are listed.
    """
    folder = _folder(source)
    stated, tied = adapter_config.read(folder / CONFIG)
    tensors = _read_tensors(folder / WEIGHTS)
    causal = _is_ours(base_params)
    if causal and not tied and _unties(stated, tensors):
        base_params = untie(base_params)
    ours = [name for name, _ in _modules(tree.flatten(base_params), axes, causal)]
    method = lora(**adapter_config.without_unmatched(stated, ours))
    params = method.init(jax.random.key(0), base_params, axes=axes)
    flat, labels = tree.flatten(params), tree.flatten(method.labels(params))
    slots = _slots(method.config, flat, [path for path in flat if labels[path] != FROZEN], causal)
    _check_tensors(folder, tensors, slots, flat, tree.flatten(base_params) if causal else {})
    return method, tree.unflatten(flat | _filled(tensors, slots, flat))


def _lora_config(method: Method) -> Mapping[str, Any]:
    parts = method.config["methods"] if method.config["peft_type"] == "CHAIN" else (method.config,)
    loras = [part for part in parts if part["peft_type"] == "LORA"]
    if len(loras) != 1:
        kinds = ", ".join(part["peft_type"] for part in parts)
        raise PeftJaxError(f"save_adapter: the method is {kinds}; an adapter file holds exactly one LORA.")
    return loras[0]


def _is_ours(params) -> bool:
    return all(path.rpartition("/")[0] in names.MODULES for path in tree.flatten(params))


def _modules(flat, axes, causal) -> list[tuple[str, str]]:
    """(our name, name in the file) of every module with a kernel, layer by layer."""
    pairs = []
    for path, leaf in flat.items():
        if path.endswith("/kernel"):
            folder = path.removesuffix("/kernel")
            stack = axes[path].stack if axes and path in axes else targets.plain_axes(leaf.shape).stack
            pairs += zip(targets.module_names(folder, stack), _file_names(folder, stack, causal))
    return pairs


def _file_names(folder: str, stack: tuple[int, ...], causal: bool) -> list[str]:
    if not causal:
        return list(targets.module_names(folder, stack))
    return [names.hf_module(folder, layer) for layer in (range(*stack) if stack else [None])]


def _slots(config, flat, trained: list[str], causal: bool) -> dict[str, Slot]:
    """Every tensor of the adapter's file, by its key, for the leaves at the paths ``trained``."""
    slots: dict[str, Slot] = {}
    for path in trained:
        folder, _, name = path.rpartition("/")
        if name in _KEYS:
            slots |= _branch_slots(config, path, flat[f"{folder}/lora_scaling".lstrip("/")].shape, causal)
        elif causal:
            slots |= _whole_slots(config, path, flat)
        else:
            slots[PREFIX + path.replace("/", ".")] = Slot(path, (), None, False)
    return slots


def _branch_slots(config, path, stack, causal) -> dict[str, Slot]:
    folder, _, name = path.rpartition("/")
    held = ranks(config, targets.module_names(folder, stack)).tolist()
    entries = itertools.product(*map(range, stack))
    return {f"{PREFIX}{module}.{_KEYS[name]}": Slot(path, entry, rank, True)
            for module, entry, rank in zip(_file_names(folder, stack, causal), entries, held) if rank}


def _whole_slots(config, path, flat) -> dict[str, Slot]:
    """Of a leaf of our models that trains as a whole. In an adapted module peft keeps it in the ``base_layer``."""
    folder, _, name = path.rpartition("/")
    stack = flat[path].shape[:1] if path.startswith("layers/") else ()
    held = ranks(config, targets.module_names(folder, stack))
    slots = {}
    for layer, rank in zip(range(*stack) if stack else [None], held):
        module, _, theirs = names.hf_tensor(path, layer).rpartition(".")
        entry = () if layer is None else (layer,)
        slots[f"{PREFIX}{module}{'.base_layer' if rank else ''}.{theirs}"] = Slot(path, entry, None, name == "kernel")
    if path == "embed_tokens/embedding" and "lm_head/kernel" not in flat:  # tied: peft stores it under both names
        slots[f"{PREFIX}lm_head.weight"] = Slot(path, (), None, False)
    return slots


def _check_scales(config, flat) -> None:
    for path, leaf in flat.items():
        if path.endswith("lora_scaling"):
            own = scalings(config, targets.module_names(path.removesuffix("lora_scaling").rstrip("/"),
                                                                    leaf.shape))
            if not np.array_equal(np.asarray(leaf).ravel(), own):
                raise PeftJaxError(f"save_adapter: '{path}' is not what this method's r and lora_alpha give: save with "
                                   "the method that made the parameters.")


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
    if absent:
        raise PeftJaxError(f"{folder} has no {' and no '.join(absent)}: it holds no adapter that can be read"
                           f"{pickled if WEIGHTS in absent else ''}.")
    return folder


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise PeftJaxError(f"{path} is damaged: {error}. Fetch it again.") from error
    bare = [key for key in tensors if not key.startswith(PREFIX)]
    if bare:
        raise PeftJaxError(f"{path} has {len(bare)} tensors without peft's '{PREFIX}' in front, the first is "
                           f"'{bare[0]}': save it with peft's save_pretrained.")
    return tensors


def _unties(stated, tensors) -> bool:
    """Whether peft gives a tied model a head of its own for this adapter."""
    saved = stated.get("modules_to_save")
    return (targets.saved(saved, "lm_head") or targets.saved(saved, "embed_tokens")
            or any(key.startswith(f"{PREFIX}lm_head.lora_") for key in tensors))


def _check_tensors(folder, tensors, slots, flat, base) -> None:
    """One error that lists every tensor that is missing, unexpected or of another shape."""
    shapes = {key: slot.of(np.broadcast_to(np.int8(0), flat[slot.path].shape)).shape for key, slot in slots.items()}
    faults = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "unexpected": [key for key in sorted(tensors.keys() - shapes.keys())
                       if not _says_nothing_new(key, tensors[key], slots, base)],
        "of another shape": [f"{key} is {list(tensors[key].shape)}, the model needs {list(shape)}"
                             for key, shape in sorted(shapes.items())
                             if key in tensors and tensors[key].shape != shape],
    }
    if said := files.faults_text(faults):
        raise PeftJaxError(f"the adapter in {folder} does not fit the model or its own config. {said}.")


def _says_nothing_new(key: str, tensor, slots, base) -> bool:
    """peft also stores biases of saved modules twice more, and an adapted head's or resized embedding's base weight.

    The latter may stand in the file as long as it is the base model's own.
    """
    if re.sub(r"\.(original_module|modules_to_save)\.", ".", key) in slots:
        return True
    layers = {leaf.shape[0] for path, leaf in base.items() if path.startswith("layers/")}
    places = names.tensors(list(base), *layers) if layers else {}
    place = places.get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    if place is None:
        return False
    own = np.asarray(base[place.path] if place.layer is None else base[place.path][place.layer])
    own = own.T if place.transposed else own
    return own.shape == tensor.shape and bool((own == tensor.astype(own.dtype)).all())


def _filled(tensors, slots, flat) -> dict[str, jax.Array]:
    """The trained leaves, from the file; what lies beyond a layer's own rank is zero."""
    leaves = {slot.path: np.zeros(flat[slot.path].shape, np.float32) for slot in slots.values()}
    for key, slot in slots.items():
        slot.of(leaves[slot.path])[...] = tensors[key]
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
