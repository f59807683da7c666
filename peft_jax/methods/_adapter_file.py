"""How leaves beside chosen kernels lie in an adapter file, and how the choice of kernels is told there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peft_jax.core import targeting
from peft_jax.core.peft_format import PREFIX, Format, Naming, Slot, arguments_of
from peft_jax.methods._kernel_adapter import SELECTION, chosen


def stored(make: Callable[..., Any], kind: str, switch: str,
           tensors: Mapping[str, tuple[str, Callable[[np.ndarray], np.ndarray]]], **others: Any) -> Format:
    """The format of a method whose every adapted layer has all its ``tensors``, in a file with the words of ``make``.

    Args:
      make: the method's function; kind: its ``peft_type``; switch: the frozen leaf (*stack).
      tensors: ``{leaf: (ending of its tensors' keys, one layer's part of the leaf -> the tensor, a view)}``.
      others: further fields of :class:`Format`, or in place of these.
    """
    keys = {leaf: key for leaf, (key, _) in tensors.items()}

    def own_slots(config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str], naming: Naming,
                  ) -> dict[str, Slot]:
        def view(leaf: str, name: str) -> Callable | None:
            return tensors[leaf][1] if chosen(config, [name])[0] else None

        return slots(flat, trained, naming, switch, keys, view)

    return Format(**{"kind": kind, "make": make, "arguments": arguments_of(make), "slots": own_slots, "fields": fields,
                     **others})


def slots(flat: Mapping[str, Any], trained: Sequence[str], naming: Naming, switch: str, keys: Mapping[str, str],
          view: Callable[[str, str], Callable | None]) -> dict[str, Slot]:
    """The tensors of a method's leaves and of the leaves that train as a whole.

    Args:
      switch: the frozen leaf (*stack).
      keys: ``{leaf: ending of its tensors' keys}``.
      view: ``(leaf, our name of the module) -> function`` from one layer's part of the leaf to the tensor, a view;
        ``None`` where the layer holds none.
    """
    tensors: dict[str, Slot] = {}
    for path in trained:
        folder, _, leaf = path.rpartition("/")
        if leaf not in keys:
            adapted = f"{folder}/{switch}".lstrip("/") in flat
            tensors |= _whole(naming, path, [view(next(iter(keys)), name) is not None for name in
                                             _names(folder, flat, switch)] if adapted else [])
            continue
        stack = flat[f"{folder}/{switch}".lstrip("/")].shape
        for entry, ours, theirs in zip(np.ndindex(*stack), _names(folder, flat, switch), naming.modules(folder, stack)):
            if (cut := view(leaf, ours)) is not None:
                tensors[f"{PREFIX}{theirs}.{keys[leaf]}"] = Slot(path, _Entry(entry, cut))
    return tensors


def _names(folder: str, flat: Mapping[str, Any], switch: str) -> tuple[str, ...]:
    return targeting.module_names(folder, flat[f"{folder}/{switch}".lstrip("/")].shape)


class _Entry:
    """A view of one entry of a stack; a class, so that each holds its own entry."""

    def __init__(self, entry: tuple[int, ...], cut: Callable[[np.ndarray], np.ndarray]):
        self.entry, self.cut = entry, cut

    def __call__(self, leaf: np.ndarray) -> np.ndarray:
        return self.cut(leaf[(*self.entry, ...)])


def _whole(naming: Naming, path: str, adapted: list[bool]) -> dict[str, Slot]:
    """Of a leaf that trains as a whole. In an adapted module peft keeps it in the ``base_layer``."""
    named = naming.whole(path)
    inside = adapted if len(adapted) == len(named) else [False] * len(named)
    tensors = {}
    for (name, slot), within in zip(named.items(), inside, strict=True):
        module, _, weight = name.rpartition(".")
        tensors[f"{PREFIX}{module}{'.base_layer' if within and naming.portable else ''}.{weight}"] = slot
    return tensors


def portable(config: Mapping[str, Any], naming: Naming,
             numbers: Callable[..., Any] = chosen) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config in words that peft reads as we do, and ``{name: numbers}`` where every module had to be spelled out.

    Our patterns may leave out peft's "model." in front of a name, which peft's may not: then every module is spelled
    out. "all-linear" becomes a list of names, as peft itself saves it. ``numbers(config, names)`` says for each module
    what it gets, something false where it is not adapted.
    """
    if not naming.portable:
        return dict(config), None
    linear = config["target_modules"] == "all-linear"
    ours, theirs = zip(*naming.pairs, *(() if linear else naming.embeddings), strict=True)
    wanted = list(numbers(config, ours))
    if linear:
        last = {name.rsplit(".", 1)[-1] for name, number in zip(theirs, wanted) if number}
        config = {**config, "target_modules": tuple(sorted(last))}
    if list(numbers(config, theirs)) == wanted:
        return dict(config), None
    adapted = {name: number for name, number in zip(theirs, wanted) if number}
    plain = {**config, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return {**plain, "target_modules": tuple(adapted)}, adapted


def fields(config: Mapping[str, Any], flat: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
    """The selection as peft reads it: the whole of what most methods have to restate."""
    return {name: value for name, value in portable(config, naming)[0].items() if name in SELECTION}
