"""Which kernels a method changes: their axes, their names, and Hugging Face peft's matching rules.

A scanned model keeps one leaf for all its layers; peft's patterns speak of each layer. So every kernel has one name per
entry of its stack: ``layers/self_attn/q_proj/kernel`` with a stack of 2 is ``layers.0.self_attn.q_proj`` and
``layers.1.self_attn.q_proj``.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peft_jax.core import patterns as regexes
from peft_jax.core import tree
from peft_jax.core.kernel_axes import KernelAxes, is_convolution, plain_axes
from peft_jax.errors import PeftJaxError, nearest

Patterns = str | tuple[str, ...] | list[str] | None
# What Hugging Face puts in front of the names of the model proper; a regex may or may not spell it out.
PREFIXES = ("", "model.", "transformer.", "bert.", "roberta.", "distilbert.")
STACKS = ("layers", "layer", "h", "blocks", "block")
_PASS_AXES = "pass axes=peft_jax.kernel_axes(model, params, *inputs)"
_UNCALLED = "module that the traced pass never called"
HEADS = ("lm_head", "score", "classifier", "embed_out", "output_projection")


class Target(NamedTuple):
    """One kernel to change: its module's path, its layout, its names in stack order, and what its leaf is called."""

    path: str
    axes: KernelAxes
    names: tuple[str, ...]
    leaf: str = "kernel"


def module_names(path: str, stack: tuple[int, ...]) -> tuple[str, ...]:
    """The dotted names of a module, one for each entry of its stack.

    >>> module_names("layers/mlp/up_proj", (2,))
    ('layers.0.mlp.up_proj', 'layers.1.mlp.up_proj')
    """
    parts = path.split("/")
    at = next((i for i, part in enumerate(parts) if part in STACKS), 0) + 1
    entries = itertools.product(*map(range, stack))
    return tuple(".".join((*parts[:at], *map(str, entry), *parts[at:])) for entry in entries)


def stacks(flat: Mapping[str, Any], axes: Mapping[str, KernelAxes] | None) -> dict[str, tuple[int, ...]]:
    """The stack in front of each module's leaves, by the module's path: that of the kernels below the same stack.

    For leaves that have no layout of their own, such as a norm's scale. ``flat`` is a flattened tree.

    >>> stacks({"layers/up/kernel": jax.numpy.ones((2, 3, 4)), "layers/norm/scale": jax.numpy.ones((2, 3))}, None)
    {'layers/up': (2,), 'layers/norm': (2,)}
    """
    tree.check_arrays(flat)
    fronts: dict[str, tuple[int, ...]] = {}
    for path, leaf in flat.items():
        if path.rpartition("/")[2] == "kernel":
            layout = plain_axes(leaf.shape) if axes is None else axes.get(path)
            fronts.setdefault(_top(path.rpartition("/")[0]), layout.stack if layout else ())
    found = {}
    for path, leaf in flat.items():
        module, front = path.rpartition("/")[0], fronts.get(_top(path.rpartition("/")[0]), ())
        found[module] = front if leaf.shape[:len(front)] == front else ()
    return found


def _top(module: str) -> str:
    """The path down to the stack that a module would be in, as :func:`module_names` finds it."""
    parts = module.split("/")
    return "/".join(parts[:next((i for i, part in enumerate(parts) if part in STACKS), 0) + 1])


def spellings(name: str) -> tuple[str, ...]:
    """The names under which peft may know a module: with its model's prefix, ``layers_3`` as ``layers.3``.

    A name that begins with such a prefix is peft's own and is taken as it is.
    """
    dotted = re.sub(r"_(\d+)(?=\.|$)", r".\1", name)
    prefixes = ("",) if name.startswith(PREFIXES[1:]) else PREFIXES
    return tuple(prefix + form for form in dict.fromkeys((name, dotted)) for prefix in prefixes)


def endings(name: str) -> set[str]:
    """What a list may hold to mean a module: its name as peft may know it, or what stands there behind a dot.

    >>> sorted(endings("model.up.q"))
    ['model.up.q', 'q', 'up.q']
    """
    return {".".join(parts[at:]) for parts in (form.split(".") for form in spellings(name)) for at in range(len(parts))}


def known_names(names: Iterable[str]) -> set[str]:
    """:func:`endings` of all ``names``: what a list may hold without an entry that means nothing."""
    return {ending for name in names for ending in endings(name)}


def listed(patterns: Patterns | frozenset[str], name: str) -> bool:
    """peft's rule: a string is a regex for the whole name, a list holds names or their endings."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        return any(regexes.match(patterns, form, whole=True) for form in spellings(name))
    return any(ending in patterns for ending in endings(name))


def unmatched(patterns: Patterns, names: Sequence[str], means: Callable[[Patterns, str], bool] = listed) -> str | None:
    """The first entry of ``patterns`` that means none of ``names``, ``None`` where there is no such. ``means``: the
    rule of a string.

    >>> unmatched(("up_proj", "gate"), ["layers.0.mlp.up_proj"]), unmatched(r".*up_proj", ["layers.0.mlp.up_proj"])
    ('gate', None)
    """
    if isinstance(patterns, str):
        return None if any(means(patterns, name) for name in names) else patterns
    known = known_names(names)
    return next((entry for entry in patterns or () if entry not in known), None)


def suggestion(patterns: Patterns, entry: str, names: Sequence[str]) -> str:
    """What to write in place of an ``entry`` of ``patterns`` that means none of ``names``.

    >>> suggestion("up_proj", "up_proj", ["layers.0.mlp.up_proj"])
    "a string is a regex for whole names, as in peft; give the list ('up_proj',)"
    """
    near = nearest(entry, (name.rsplit(".", 1)[-1] for name in names))
    if not isinstance(patterns, str):
        return near
    ending = any(listed((entry,), name) for name in names)
    return f"a string is a regex for whole names, as in peft; {f'give the list {(entry,)}' if ending else near}"


def within(modules: Patterns, name: str) -> bool:
    """Whether ``name`` is one of ``modules`` or lies inside one: such a module takes no adapter."""
    return any(f".{m}." in f".{form}." for form in spellings(name) for m in modules or ())


def saved(modules: Patterns, name: str) -> bool:
    """Whether ``modules_to_save`` trains the module: it or one around it ends in one of them, as text.

    As in peft, where "norm" is every norm of a Llama.
    """
    parts = name.split(".")
    around = [form for i in range(len(parts)) for form in spellings(".".join(parts[:i + 1]))]
    endings_to_save = tuple(modules or ())
    return any(form.endswith(endings_to_save) for form in around)


def layer_index(name: str, layers_pattern: Patterns) -> int | None:
    """The first number in a name that follows ``layers_pattern``, or any word; ``None`` where there is none."""
    words = (layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern or ())
    for word in words or (r"[^.]*",):
        for form in spellings(name):
            if found := regexes.match(rf"(?:^|.*?\.){word}\.(?P<number_of_layer>\d+)\.", form):
                return int(found["number_of_layer"])
    return None


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key that matches the end of ``name`` (a regex), as peft's ``rank_pattern``."""
    for key, value in (patterns or {}).items():
        if any(regexes.match(rf"(.*\.)?({key})$", form) for form in spellings(name)):
            return value
    return default


def chooser(target_modules: Patterns, exclude_modules: Patterns = None,
            layers_to_transform: int | tuple[int, ...] | None = None, layers_pattern: Patterns = None,
            modules_to_save: Patterns = None) -> Callable[[str], bool]:
    """Whether a module of some name is meant, by peft's arguments of the same names."""
    layers = (layers_to_transform,) if isinstance(layers_to_transform, int) else layers_to_transform
    wanted, excluded = (several if several is None or isinstance(several, str) else frozenset(several)
                        for several in (target_modules, exclude_modules))

    def chosen(name: str) -> bool:
        if listed(excluded, name) or within(modules_to_save, name) or not _meant(wanted, name):
            return False
        return not layers or isinstance(target_modules, str) or layer_index(name, layers_pattern) in layers

    return chosen


def find(params: Mapping[str, Any], axes: Mapping[str, KernelAxes] | None, selection: Mapping[str, Any],
         holders: Sequence[str] = ("kernel",)) -> list[Target]:
    """The kernels that ``selection``, the arguments of :func:`chooser`, means for at least one entry of their stack.

    ``holders`` of ``HOLDERS`` are looked at; embeddings and convolutions are never part of "all-linear". Raises
    ``PeftJaxError`` where nothing is chosen or one entry of a list matches no kernel, naming the nearest.
    """
    linear = selection["target_modules"] == "all-linear"
    wanted = ("kernel",) if linear else holders
    everything = [_target(path, leaf, axes) for path, leaf in tree.flatten_arrays(params).items()
                  if path.rsplit("/", 1)[-1] in wanted]
    everything = [target for target in everything if not (linear and is_convolution(target.axes))]
    _check_patterns(selection["target_modules"], everything)
    _check_layers(selection["layers_to_transform"], selection["layers_pattern"], everything)
    chosen = chooser(**selection)
    targets = [_understood(target) for target in everything if any(map(chosen, target.names))]
    if not targets:
        limits = ", ".join(f"{name}={value!r}" for name, value in selection.items() if value is not None)
        limits = limits or "target_modules=None"
        raise PeftJaxError(f"{limits} leaves no module to adapt.")
    return targets


def _check_layers(layers, layers_pattern, everything) -> None:
    indices = [layer_index(name, layers_pattern) for target in everything for name in target.names]
    numbers = {index for index in indices if index is not None}
    for layer in (layers,) if isinstance(layers, int) else layers or ():
        if layer not in numbers:
            there = f"are numbered from {min(numbers)} to {max(numbers)}" if numbers else (
                f"have no numbers behind layers_pattern={layers_pattern!r}")
            raise PeftJaxError(f"layers_to_transform has {layer}, which is no layer of this model: they {there}.")


def _target(path, leaf, axes) -> Target:
    layout = plain_axes(leaf.shape) if axes is None else axes.get(path) or KernelAxes(_UNCALLED, (), (), ())
    module, _, name = path.rpartition("/")
    return Target(module, layout, module_names(module, layout.stack), name)


def _understood(target: Target) -> Target:
    if target.axes.kind == _UNCALLED:
        raise PeftJaxError(f"'{target.path}' is a {_UNCALLED}: exclude it (exclude_modules), or give kernel_axes "
                           "inputs of a pass that calls it.")
    if not target.axes.inputs:
        more = f", or {_PASS_AXES}" if target.axes.kind.startswith("kernel of") else ""  # else they were passed
        raise PeftJaxError(f"'{target.path}' is a {target.axes.kind} of unknown input and output axes: exclude it"
                           f"{more}.")
    return target


def _meant(target_modules: Patterns | frozenset[str], name: str) -> bool:
    if target_modules == "all-linear":
        return name.rsplit(".", 1)[-1] not in HEADS
    return listed(target_modules, name)


def _check_patterns(target_modules, everything) -> None:
    names = [name for t in everything for name in t.names]
    tied = " A head that is tied to the embedding has none: peft_jax.untie(params) gives it one."
    if (entry := unmatched(target_modules, names, _meant)) is not None:
        stacks = [t.path for t in everything if t.axes.stack and listed((entry,), t.path.replace("/", "."))]
        if stacks and not any(listed((entry,), name) for name in names):
            raise PeftJaxError(f"target_modules has '{entry}', and '{stacks[0]}/kernel' of three axes was read as a "
                               f"stack of layers: {_PASS_AXES}.")
        raise PeftJaxError(f"target_modules has '{entry}', which matches no kernel of this model: "
                           f"{suggestion(target_modules, entry, names)}{tied if entry.endswith('lm_head') else ''}")
    if isinstance(target_modules, str) and "lm_head" in target_modules and "lm_head" not in names and listed(
            target_modules, "lm_head"):
        raise PeftJaxError(f"target_modules={target_modules!r} matches lm_head, a kernel that this model lacks.{tied}")
