"""Our parameter paths and Hugging Face's names: for weights and for adapters, by the one table of a model's family.

A stacked module is one module here and one per layer there: ``layers/self_attn/q_proj`` is
``model.layers.0.self_attn.q_proj``, ``model.layers.1.self_attn.q_proj`` and so on.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from peft_jax.errors import PeftJaxError, nearest


class Module(NamedTuple):
    """One module at Hugging Face: its name, ``{}`` for the layer; our leaf for its ``weight``; whether that is
    transposed: torch's Linear keeps (out, in), a Flax kernel (in, out)."""

    name: str
    leaf: str
    transposed: bool = False


def linear(name: str) -> Module:
    return Module(name, "kernel", True)


def conv1d(name: str) -> Module:
    """A linear layer of GPT-2, whose weight is (in, out) there too."""
    return Module(name, "kernel")


def norm(name: str) -> Module:
    return Module(name, "scale")


def embedding(name: str) -> Module:
    return Module(name, "embedding")


Table = Mapping[str, Module]  # by our path


class Place(NamedTuple):
    """Where one Hugging Face tensor lies here: leaf path, layer (``None`` unstacked), and whether it is transposed."""

    path: str
    layer: int | None
    transposed: bool


def without_prefix(table: Table, prefix: str) -> Table:
    """The names in a checkpoint whose writer left ``prefix`` out."""
    return {path: module._replace(name=module.name.removeprefix(prefix)) for path, module in table.items()}


def is_stacked(table: Table, module: str) -> bool:
    """Whether our module is one for all layers."""
    return module in table and "{}" in table[module].name


def hf_module(table: Table, path: str, layer: int | None = None) -> str:
    """Hugging Face's name of our module ``path``; ``layer`` counts from 0 and is needed for a stacked one.

    >>> hf_module({"layers/mlp/up_proj": linear("model.layers.{}.mlp.up_proj")}, "layers/mlp/up_proj", 3)
    'model.layers.3.mlp.up_proj'
    """
    if path not in table:
        raise PeftJaxError(f"module '{path}' has no Hugging Face name: {nearest(path, table)}")
    if is_stacked(table, path) == (layer is None):
        raise PeftJaxError(f"module '{path}' {'needs a' if layer is None else 'has no'} layer number.")
    return table[path].name.format(layer)


def our_module(table: Table, name: str) -> tuple[str, int | None]:
    """The inverse of :func:`hf_module`: our path and the layer, ``None`` outside the stack."""
    found = re.search(r"\.(\d+)\.", f".{name}")
    generic = re.sub(r"\.\d+\.", ".{}.", f".{name}", count=1).removeprefix(".")
    ours = {module.name: path for path, module in table.items()}
    if generic not in ours:
        raise PeftJaxError(f"'{name}' is no module of this model family: {nearest(generic, ours)}")
    return ours[generic], int(found[1]) if found else None


def place(table: Table, path: str, layer: int | None = None) -> tuple[str, Place]:
    """Hugging Face's tensor of our leaf ``path``, and its place.

    >>> place({"norm": norm("model.norm")}, "norm/scale")
    ('model.norm.weight', Place(path='norm/scale', layer=None, transposed=False))
    """
    module, _, leaf = path.rpartition("/")
    name = hf_module(table, module, layer)
    if leaf not in ("bias", table[module].leaf):
        raise PeftJaxError(f"leaf '{path}' has no Hugging Face name: it is no plain weight of the model.")
    bias = leaf == "bias"
    return f"{name}.{'bias' if bias else 'weight'}", Place(path, layer, not bias and table[module].transposed)


def tensors(table: Table, paths: Iterable[str], layers: int) -> dict[str, Place]:
    """Every Hugging Face tensor that makes up our leaves ``paths`` in a model of ``layers`` layers, and its place.

    Raises ``PeftJaxError`` for a leaf that Hugging Face's model does not have (a method's own leaf, for example).
    """
    return dict(place(table, path, layer) for path in paths
                for layer in (range(layers) if is_stacked(table, path.rpartition("/")[0]) else [None]))
