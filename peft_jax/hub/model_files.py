"""A pretrained model before its weights are read: where its files are, and what its config.json says."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.errors import PeftJaxError, nearest
from peft_jax.hub import download, families, model_config
from peft_jax.hub.formats import bitsandbytes as bnb
from peft_jax.hub.formats import gguf
from peft_jax.method import Method
from peft_jax.models.heads import POOLINGS, TASK_TYPES, Head


class ModelFiles(NamedTuple):
    """What :func:`open_model` found. :func:`peft_jax.load_pretrained` takes it in place of a source.

    source: as it was given.
    path: the local folder or ``.gguf`` file.
    fields: what config.json says, as it is there.
    config: the model's config, such as a ``LlamaConfig``, with ``head`` in place of its own.
    head: the head that was asked for, ``None`` for the checkpoint's own.
    """

    source: str | os.PathLike
    path: Path
    fields: dict[str, Any]
    config: Any
    head: Head | None


def open_model(source: str | os.PathLike, head: Head | None = None, weights: bool = True) -> ModelFiles:
    """Find a pretrained model and read its config.json; no weights are read.

    Args:
      source: as of :func:`peft_jax.load_pretrained`.
      head: of an encoder, in place of the one that the checkpoint has.
      weights: ``False`` downloads no weights of a Hub id.
    Raises:
      PeftJaxError: source not to be had, unknown architecture, or a head that the model cannot have.
    """
    path = download.resolve(source, weights=weights)
    fields = gguf.read_config(path) if path.is_file() else model_config.read(path)
    return ModelFiles(source=source, path=path, fields=fields, config=with_head(model_config.from_hf(fields), head),
                      head=head)


def with_head(config: Any, head: Head | None) -> Any:
    """``config`` with ``head`` in place of its own, if one is given; ``PeftJaxError`` where it cannot have it."""
    if head is None:
        return config
    if not hasattr(config, "head"):
        raise PeftJaxError(f"a {config.model_type} model is read as a language model only, without a classification "
                           f"head: use one of: {', '.join(k for k, f in families.KINDS.items() if f.heads)}.")
    for name, choices in (("task_type", TASK_TYPES), ("pooling", POOLINGS)):
        if getattr(head, name) not in choices:
            raise PeftJaxError(f"head.{name}={getattr(head, name)!r}: {nearest(str(getattr(head, name)), choices)}")
    if head.num_labels < 1:
        raise PeftJaxError(f"head.num_labels={head.num_labels}: give 1 for a regression, more for classes.")
    return dataclasses.replace(config, head=head)


def quantised_as(files: ModelFiles) -> Method | None:
    """How the checkpoint's weights that stay quantised by default are, by its config.json alone.

    The result is a method that would make such weights of plain ones; ``None`` where the checkpoint's are plain.
    """
    return None if files.path.is_file() else bnb.planned(files.path, files.fields)
