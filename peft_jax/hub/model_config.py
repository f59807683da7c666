"""Hugging Face's ``config.json`` to a model's config and back; what is in it is each family's own matter."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core import files, tree
from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub import families


def read(folder: Path) -> dict[str, Any]:
    """The dict in ``folder/config.json``. Raises ``PeftJaxError`` where it is missing or no JSON object."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        held = [file.name for file in sorted(folder.glob("*.gguf"))]
        advice = f"it holds {held[0]}, name that file" if held else "name a folder that save_pretrained wrote"
        raise PeftJaxError(f"{folder} has no config.json: {advice}.")
    return files.read_json(path)


def from_hf(given: Mapping[str, Any]) -> Any:
    """The model that a Hugging Face config dict describes: the config class of its family, such as ``LlamaConfig``.

    Raises:
      PeftJaxError: a model type that is in no family (the message names the nearest), a missing size, or a feature of
        the architecture that is not supported.
    """
    kind = str(given["model_type"]) if "model_type" in given else _kind_of(given)
    if kind not in families.KINDS:
        raise PeftJaxError(f"model_type '{kind:.60}' is not supported: {nearest(kind, families.KINDS)}")
    with files.reading("config.json", f"the config of a {kind} model", "correct it"):
        return families.KINDS[kind].read(kind, given)


def to_hf(config: Any, dtype: str = "float32", token_ids: Mapping[str, int | None] | None = None) -> dict[str, Any]:
    """The config dict that transformers reads, old releases and new.

    Args:
      dtype: the weights' type as torch names it: ``float32``, ``bfloat16``, ``float16``.
      token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id``; ``None`` where unknown.

    Raises:
      PeftJaxError: a combination of fields that ``model_type`` cannot say.
    """
    unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    kind = config.model_type
    result = {"model_type": kind, "torch_dtype": dtype, **unknown, **families.of(config).write(config),
              **(token_ids or {})}
    again = from_hf(result)
    # Which program computes attention is a run's matter, and not the model's.
    if again != dataclasses.replace(config, attn_implementation=again.attn_implementation):
        raise PeftJaxError(f"this {type(config).__name__} cannot be written as a '{kind}' config.json: its biases, "
                           f"norms or windowed layers are not those of a {kind} model. Change model_type.")
    return result


def param_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """``{path: shape}`` of the parameters of a pretrained model; a tied one has no ``lm_head``."""
    model = families.of(config).model(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in tree.flatten(shapes).items()}


def _kind_of(given: Mapping[str, Any]) -> str:
    names = given.get("architectures")
    names = names if isinstance(names, list) else [names]
    kinds = [kind for family in families.FAMILIES for kind, name in family.kinds.items() if name in names]
    if not kinds:
        raise PeftJaxError(f"config.json names no model_type; set it to one of: {', '.join(families.KINDS)}.")
    return kinds[0]
