"""Write a model as a folder that transformers reads."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import quant
from peft_jax.core import arguments, files, tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub import families, model_config
from peft_jax.hub.chat_template import stops
from peft_jax.hub.families import hf_names
from peft_jax.hub.families.family import table_of
from peft_jax.hub.formats import bitsandbytes as bnb

_INDEX = "model.safetensors.index.json"


def save_pretrained(
    folder: str | os.PathLike,
    model: Any,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, safetensors weights and the tokenizer, so that transformers and ``load_pretrained`` read them.

    Everything is written aside and then renamed; an older model in ``folder`` is replaced only when the new one is
    whole, other files in it stay.

    Args:
      folder: made where missing.
      params: as ``load_pretrained`` gives or a method's ``merge`` makes them; each keeps its dtype. A ``lm_head``
        among them is written even where the config ties it, and config.json then says it is not tied. Quantised
        kernels (nf4 and fp4) are written as bitsandbytes' are, bit for bit.
      tokenizer: a transformers tokenizer; its special tokens also go to config.json, and to generation_config.json
        those at which a text ends: eos and the chat template's end of a turn.
      max_shard_bytes: weights above it are split over several files with an index.

    Raises:
      PeftJaxError: leaves of a fine-tuning method (merge first), quantised ones that bitsandbytes cannot hold,
        missing leaves, shapes that are not the model's, or a folder that cannot be written.
    """
    arguments.check("save_pretrained", {"folder": folder, "model": model, "params": params})
    flat, folder, config = tree.flatten(params), Path(folder), _config_of(model)
    if families.of(config).tied and "lm_head/kernel" in flat:
        config = dataclasses.replace(config, tie_word_embeddings=False)
    places = _checked_places(flat, config)
    packed = {path: leaf for path, leaf in flat.items() if quant.is_leaf(leaf)}
    described = {"quantization_config": bnb.described(packed, _left_out(config, places, packed))} if packed else {}
    with files.written_aside(folder, "model", last="config.json", stale=("model*.safetensors", _INDEX)) as scratch:
        _write_weights(scratch, flat, places, max_shard_bytes)
        if tokenizer is not None:
            _write_tokenizer(scratch, tokenizer)
            if hasattr(model, "init_cache"):  # it writes
                _write_json(scratch / "generation_config.json", _generation_config(tokenizer))
        stated = model_config.to_hf(config, _torch_dtype(flat), _token_ids(tokenizer)) | described
        _write_json(scratch / "config.json", stated)


def _config_of(model: Any) -> Any:
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in families.KINDS:
        raise PeftJaxError(f"save_pretrained: a {type(model).__name__} is no model of peft_jax.models, of which alone "
                           f"Hugging Face's names are known: {', '.join(families.KINDS)}.")
    return config


def _left_out(config: Any, places: dict[str, hf_names.Place], packed: Mapping[str, Any]) -> set[str]:
    """What transformers calls the modules beside quantised ones: each by its last name, which stands for all that end
    so, or where one of those is quantised by its whole name; where one ends in that, too, by a regex."""
    modules = {name.rpartition(".")[0]: place.path in packed for name, place in places.items()
               if place.path.endswith("/kernel")}
    quantised = tuple(name for name, is_packed in modules.items() if is_packed)
    theirs = {"lm_head", "pooler.dense"} if families.of(config).heads else {"lm_head"}  # there even if in no file
    left = {name for name in theirs if not any(other.endswith(name) for other in quantised)}
    for name in modules.keys() - set(quantised):
        forms = (name.rpartition(".")[2], name, f"^{name}$")
        left.add(next(form for form in forms if not any(other.endswith(form) for other in quantised)))
    return left


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception for a full disk
        raise OSError(str(error)) from error


def _checked_places(flat: dict[str, Any], config: Any) -> dict[str, hf_names.Place]:
    shapes = model_config.param_shapes(config)
    kinds = jax.Array | np.ndarray | quant.QuantizedArray
    foreign = [path for path in flat if path not in shapes or not isinstance(flat[path], kinds)]
    if foreign:
        raise PeftJaxError(f"'{foreign[0]}' (of {len(foreign)} such leaves) is no plain weight of the model: merge "
                           "first, save_pretrained(folder, model, method.merge(params)), or save the adapter alone.")
    absent = [path for path in shapes if path not in flat]
    if absent:
        raise PeftJaxError(f"params lack '{absent[0]}' ({len(absent)} leaves in all): give the whole tree, "
                           "combine(frozen, trainable).")
    for path, shape in shapes.items():
        if flat[path].shape != shape:
            raise PeftJaxError(f"'{path}' has shape {flat[path].shape}, the model's config says {shape}.")
    return hf_names.tensors(table_of(families.of(config), shapes), shapes, config.num_hidden_layers)


def _write_weights(folder: Path, flat: dict[str, Any], places: dict[str, hf_names.Place], most: int) -> None:
    from safetensors.numpy import save_file

    shards = _shards(flat, places, most)
    parts = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        parts = ["model.safetensors"]
    for file, shard in zip(parts, shards, strict=True):  # one shard in host memory at a time
        tensors = {key: value for name in shard for key, value in _tensors(flat, name, places[name]).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(parts, shards, strict=True) for name in shard}
        total = sum(leaf.nbytes for leaf in flat.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        Path(folder, _INDEX).write_text(text + "\n", encoding="utf-8")


def _shards(flat: dict[str, Any], places: dict[str, hf_names.Place], most: int) -> list[list[str]]:
    """Tensor names in files of at most ``most`` bytes (a larger tensor has a file of its own), layer by layer."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, place in sorted(places.items(), key=lambda item: -1 if item[1].layer is None else item[1].layer):
        leaf = flat[place.path]
        nbytes = leaf.nbytes if place.layer is None else leaf.nbytes // leaf.shape[0]
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _tensors(flat: dict[str, Any], name: str, place: hf_names.Place) -> dict[str, np.ndarray]:
    leaf = jax.tree.map(lambda buffer: buffer if place.layer is None else buffer[place.layer], flat[place.path])
    if quant.is_leaf(leaf):
        return bnb.written(name, leaf)
    return {name: np.ascontiguousarray(np.asarray(leaf).T if place.transposed else np.asarray(leaf))}


def _torch_dtype(flat: dict[str, Any]) -> str:
    return jnp.dtype(next(leaf for path, leaf in flat.items() if path.endswith("/embedding")).dtype).name


def _token_ids(tokenizer: Any) -> dict[str, int | None]:
    keys = () if tokenizer is None else ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: getattr(tokenizer, key) for key in keys}


def _generation_config(tokenizer: Any) -> dict[str, Any]:
    """transformers' file of where a text ends; without it, ``generate`` knows of no more than config.json's eos."""
    return _token_ids(tokenizer) | {"eos_token_id": list(stops(tokenizer).ids) or None}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
