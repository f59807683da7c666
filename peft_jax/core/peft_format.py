"""How a method's leaves lie in an adapter's two files: told by the method, carried out by :mod:`peft_jax.hub`.

The files are Hugging Face peft's, ``adapter_config.json`` and ``adapter_model.safetensors``. A stacked leaf is one
tensor per layer there, in torch's layout; a :class:`Slot` is the tensor as a view of the leaf, so that one description
serves both ways.
"""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from peft_jax.errors import PeftJaxError

PREFIX = "base_model.model."  # peft's two wrappers around the model


def _same(leaf: np.ndarray) -> np.ndarray:
    return leaf


class Slot(NamedTuple):
    """Where one tensor of the file lies: the leaf's path, the tensor as a numpy view of the leaf, its shape in the file
    where that has other axes than the view."""

    path: str
    view: Callable[[np.ndarray], np.ndarray] = _same
    shape: tuple[int, ...] | None = None

    def tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor as the file has it."""
        part = self.view(leaf)
        return np.ascontiguousarray(part if self.shape is None else part.reshape(self.shape))

    def fill(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Write the file's tensor into its place in the leaf."""
        part = self.view(leaf)
        part[...] = tensor.reshape(part.shape)


class Naming(NamedTuple):
    """What the file calls the modules of a model: Hugging Face's names of our own models, dotted paths of others.

    Fields:
      modules: ``(path, stack) -> [name]``, of a module's path, in the order of its stack; ``PREFIX`` not included.
      whole: ``(path of a leaf) -> {name of a tensor: Slot}``, of a leaf that trains as a whole.
      pairs: (our name, name in the file) of every module with a kernel, layer by layer.
      portable: whether the file's names are Hugging Face's, so that real peft reads it.
      fan_in_fan_out: whether the model's own linear layers keep a weight as (in, out) at Hugging Face, as GPT-2's do.
      owners: pairs as above of every module with leaves, norms and embeddings too.
      embeddings: pairs of modules with an embedding alone.
      tied: ``{path of an embedding that is the head as well: the head's name}``.
      heads: how many attention heads the model has, ``None`` where it is not told.
    """

    modules: Callable[[str, tuple[int, ...]], Sequence[str]]
    whole: Callable[[str], dict[str, Slot]]
    pairs: Sequence[tuple[str, str]]
    portable: bool
    fan_in_fan_out: bool = False
    owners: Sequence[tuple[str, str]] = ()
    embeddings: Sequence[tuple[str, str]] = ()
    tied: Mapping[str, str] = MappingProxyType({})
    heads: int | None = None


def _no_fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    return {}


def _always(stated: Mapping[str, Any]) -> bool:
    return True


def _as_stated(stated: Mapping[str, Any], where: str) -> dict[str, Any]:
    return dict(stated)


def _as_it_is(config: Mapping[str, Any], flat: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return config, flat


def _savable(config: Mapping[str, Any], flat: Mapping[str, Any]) -> str:
    return ""


class Format(NamedTuple):
    """How one kind of adapter is stored.

    Fields:
      kind: ``peft_type``.
      make: the method's function; ``arguments``: those of its arguments that the file states under the same names.
      slots: ``(config, flat params, paths of trained leaves, naming) -> {key in the file: Slot}``, whole keys, with
        ``PREFIX`` where peft has it; raises where a trained leaf has no place.
      fields: ``(config, flat params, naming) -> {field: value}``, fields of the config beside or instead of the
        arguments.
      silent: fields that do not change what a stored adapter computes.
      read: ``(arguments of the file, where) -> arguments`` as ``make`` takes them; raises ``PeftJaxError`` naming the
        file ``where`` for a value that is not supported.
      claims: ``(config file's content) -> bool``, where several methods share a ``peft_type``.
      plain: ``(config, flat params) -> (config, flat params)`` without what only training needed, before saving.
      unsavable_because: ``(config, flat params) -> reason`` why an adapter file of these parameters would be useless,
        as nobody else has the base that they need; ``""`` where it would not. With a reason the whole model is saved.
    """

    kind: str
    make: Callable[..., Any]
    arguments: tuple[str, ...]
    slots: Callable[..., dict[str, Slot]]
    fields: Callable[..., dict[str, Any]] = _no_fields
    silent: tuple[str, ...] = ()
    read: Callable[[Mapping[str, Any], str], dict[str, Any]] = _as_stated
    claims: Callable[[Mapping[str, Any]], bool] = _always
    plain: Callable[..., tuple] = _as_it_is
    unsavable_because: Callable[..., str] = _savable


def arguments_of(make: Callable[..., Any], without: Sequence[str] = ()) -> tuple[str, ...]:
    """The names of a method's arguments, in order, for :class:`Format`.

    >>> arguments_of(lambda r, bias, init_weights: None, without=("bias",))
    ('r', 'init_weights')
    """
    return tuple(name for name in signature(make).parameters if name not in without)


def no_place(paths: Sequence[str], kind: str) -> PeftJaxError:
    """The error for trained leaves that a kind of adapter file has no place for."""
    return PeftJaxError(f"'{paths[0]}' (of {len(paths)} such leaves) is trained, but a {kind} adapter file has no "
                        "place for it.")
