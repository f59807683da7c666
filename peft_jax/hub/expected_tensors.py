"""The tensors of a checkpoint against those that its config.json asks for, by names and shapes alone."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from peft_jax import errors
from peft_jax.errors import PeftJaxError
from peft_jax.hub import families
from peft_jax.hub.families.hf_names import Place

# Tensors that old checkpoints carry and no model reads: they follow from the config.
_DERIVED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias", "embeddings.position_ids")


def check(path: Path, stored: dict[str, Any], places: dict[str, Place], shapes: dict[str, tuple[int, ...]],
          config: Any) -> None:
    """Raise one ``PeftJaxError`` that lists every tensor that is missing, unexpected or of another shape.

    Args:
      path: of the checkpoint, for the error.
      stored: its tensors by Hugging Face's name, each with a ``shape``.
      places: where those that the model has lie in its leaves. shapes: of the leaves, by path.
    """
    family = families.of(config)
    unexpected = [name for name in stored.keys() - places.keys()
                  if not name.endswith(_DERIVED) and not re.fullmatch(family.other_heads, name)]
    if family.tied and config.tie_word_embeddings and "lm_head.weight" in unexpected:
        unexpected.remove("lm_head.weight")
        embedding = next(name for name, place in places.items() if place.path == family.tied)
        _check_tied_head(path, stored, embedding)
    odd_shapes = []
    for name in stored.keys() & places.keys():
        shape, expected = stored[name].shape, _their_shape(places[name], shapes)
        if shape != expected:
            odd_shapes.append(f"{name} is {list(shape)}, the config says {list(expected)}")
    faults = {"missing": places.keys() - stored.keys(), "unexpected": unexpected, "of another shape": odd_shapes}
    if said := errors.faults_text(faults):
        raise PeftJaxError(f"the weights in {path} do not fit its config.json ({config.model_type}). {said}.")


def _check_tied_head(folder: Path, stored: dict[str, Any], name: str) -> None:
    head, embedding = stored["lm_head.weight"], stored.get(name)
    if embedding is not None and (head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read())):
        raise PeftJaxError(f"{folder} says tie_word_embeddings, but its lm_head.weight differs from the embedding: set "
                           "tie_word_embeddings to false in config.json to use it.")


def _their_shape(place: Place, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    shape = shapes[place.path] if place.layer is None else shapes[place.path][1:]
    return shape[::-1] if place.transposed else shape
