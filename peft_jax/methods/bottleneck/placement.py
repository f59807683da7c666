"""Where bottleneck adapters stand, in the tree and in a file: in whole sublayers, which own no kernel."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from peft_jax.core import kernel_axes, targeting
from peft_jax.core.peft_format import Naming, Slot
from peft_jax.errors import PeftJaxError
from peft_jax.methods import _adapter_file as adapter_file
from peft_jax.methods import _kernel_adapter as kernel_adapter

LAST = ("o_proj", "down_proj", "c_proj", "out_proj")  # whose outputs are as wide as their sublayer's
SWITCH = "adapter_scaling"
# Leaves that some options add, and the endings of their tensors' keys.
EXTRAS = {"adapter_scale": "adapter_scale", "adapter_norm_before": "adapter_norm_before.weight",
          "adapter_norm_before_bias": "adapter_norm_before.bias", "adapter_norm_after": "adapter_norm_after.weight",
          "adapter_norm_after_bias": "adapter_norm_after.bias"}
Axes = Mapping[str, kernel_axes.KernelAxes] | None


class Place(NamedTuple):
    """A module that takes an adapter: its path, its stack, its names in stack order, the width of its output."""

    path: str
    stack: tuple[int, ...]
    names: tuple[str, ...]
    width: int


def chosen(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """Whether each module takes an adapter, by its name: bool (len(names),)."""
    return np.array([named(config, name) and targeting.layer_index(f"{name}.", None) not in config["leave_out"]
                     for name in names], bool)


def named(config: Mapping[str, Any], name: str) -> bool:
    """Whether ``name`` is a place for an adapter, layers left out included."""
    if targeting.listed(config["attention_modules"], name):
        return config["mh_adapter"]
    return config["output_adapter"] and targeting.listed(config["output_modules"], name)


def find(config: Mapping[str, Any], flat: Mapping[str, Any], axes: Axes) -> list[Place]:
    """The modules that take an adapter in at least one layer.

    Raises ``PeftJaxError`` where a pattern names none, no width can be told, or leave_out has a layer that is none.
    """
    stacks = _stacks(flat, axes)
    names = {path: targeting.module_names(path, stack) for path, stack in stacks.items()}
    _check_patterns(config, names)
    paths = [path for path, modules in names.items() if any(named(config, name) for name in modules)]
    layers = {targeting.layer_index(f"{name}.", None) for path in paths for name in names[path]}
    if odd := [layer for layer in config["leave_out"] if layer not in layers]:
        raise PeftJaxError(f"leave_out has {odd[0]!r}, which is no layer: they are numbered from 0 to "
                           f"{max((layer for layer in layers if layer is not None), default=0)}.")
    places = [Place(path, stacks[path], names[path], _width(config, path, flat, axes)) for path in paths
              if chosen(config, names[path]).any()]
    if not places:
        raise PeftJaxError(f"leave_out={config['leave_out']!r} leaves no layer to adapt.")
    return places


def _layout(path: str, leaf: Any, axes: Axes) -> kernel_axes.KernelAxes | None:
    """Of a kernel, or of a norm's scale, whose width stands as ``outputs``; ``None`` of any other leaf."""
    name = path.rpartition("/")[2]
    if name == "kernel":
        return kernel_axes.plain_axes(leaf.shape) if axes is None else axes.get(path)
    if name == "scale":
        return kernel_axes.KernelAxes("norm", leaf.shape[:-1], (), leaf.shape[-1:])
    return None


def _stacks(flat: Mapping[str, Any], axes: Axes) -> dict[str, tuple[int, ...]]:
    """The stack of every folder, as the first kernel or norm in or below it has it."""
    stacks: dict[str, tuple[int, ...]] = {}
    for path, leaf in flat.items():
        if (layout := _layout(path, leaf, axes)) is not None:
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                stacks.setdefault("/".join(parts[:depth]), layout.stack)
    return stacks


def _width(config: Mapping[str, Any], path: str, flat: Mapping[str, Any], axes: Axes) -> int:
    if config["hidden_size"] is not None:
        return config["hidden_size"]
    inside = {name.removeprefix(f"{path}/"): layout.outputs for name, leaf in flat.items()
              if name.startswith(f"{path}/") and (layout := _layout(name, leaf, axes)) and layout.outputs}
    kernels = {name: outputs for name, outputs in inside.items() if name.endswith("kernel")} or inside
    told = [outputs for name, outputs in kernels.items() if name.rpartition("/")[0] in ("", *LAST)]
    wide = told or list(kernels.values())
    if len(wide) != 1 or len(wide[0]) != 1:
        raise PeftJaxError(f"'{path}' has {len(kernels)} kernels, none of them {', '.join(LAST)} with one output axis: "
                           "give the width of its output, hidden_size=.")
    return wide[0][0]


def _check_patterns(config: Mapping[str, Any], names: Mapping[str, Sequence[str]]) -> None:
    for adapter, modules in (("mh_adapter", "attention_modules"), ("output_adapter", "output_modules")):
        wanted, known = config[modules] if config[adapter] else (), [name for each in names.values() for name in each]
        if (entry := targeting.unmatched(wanted, known)) is not None:
            raise PeftJaxError(f"{modules} has '{entry}', which is no module of this model: "
                               f"{targeting.suggestion(wanted, entry, [path.replace('/', '.') for path in names])}")


def blocks(flat: Mapping[str, Any], modules: Callable[..., Sequence[str]], path: str, stack: tuple[int, ...],
           ) -> list[str]:
    """The file's names of a module that owns no weight: what is in front of the names of one below it."""
    owned = f"{path}/kernel" in flat or f"{path}/scale" in flat
    below = path if owned else next(name.rpartition("/")[0] for name in flat
                                    if name.startswith(f"{path}/") and name.endswith("/kernel"))
    parts = below.count("/") - path.count("/")
    return [name.rsplit(".", parts)[0] if parts else name for name in modules(below, stack)]


def scalings(config: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    """The fixed factor of each module by its name, float32 (len(names),), 0 where it is not adapted."""
    s = 1.0 if isinstance(config["scaling"], str) else config["scaling"]
    return np.where(chosen(config, names), s, 0).astype(np.float32)


def slots(keys: Mapping[str, str], config: Mapping[str, Any], flat: Mapping[str, Any], trained: Sequence[str],
          naming: Naming) -> dict[str, Slot]:
    """The tensors of an adapter: matrices as torch has them, (out, in)."""
    for folder in kernel_adapter.folders(flat, SWITCH):
        scaling = flat[folder + SWITCH]
        names = targeting.module_names(folder.rstrip("/"), scaling.shape)
        if not np.array_equal(np.ravel(scaling), scalings(config, names)):
            raise PeftJaxError(f"save_adapter: '{folder}{SWITCH}' is not what this method's scaling and leave_out "
                               "give: save with the method that made the parameters.")
    naming = naming._replace(modules=partial(blocks, flat, naming.modules))
    return adapter_file.slots(flat, trained, naming, SWITCH, {**keys, **EXTRAS}, partial(_view, config))


def _view(config: Mapping[str, Any], leaf: str, name: str) -> Callable | None:
    if not chosen(config, [name])[0]:
        return None
    return (lambda part: part.T) if leaf in ("adapter_down", "adapter_up") else (lambda part: part.reshape(part.shape))
