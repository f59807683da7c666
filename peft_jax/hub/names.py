"""Our parameter paths and Hugging Face's names, one table for weights and for adapters.

A module below ``layers`` is one stacked module here and one per layer there: ``layers/self_attn/q_proj`` is
``model.layers.0.self_attn.q_proj``, ``model.layers.1.self_attn.q_proj`` and so on.
"""

import re
from typing import NamedTuple

from peft_jax.errors import PeftJaxError, nearest

# Our module path -> (Hugging Face's module name, our leaf for its ``weight``).
MODULES = {
    "embed_tokens": ("model.embed_tokens", "embedding"),
    "layers/input_layernorm": ("model.layers.{}.input_layernorm", "scale"),
    "layers/self_attn/q_proj": ("model.layers.{}.self_attn.q_proj", "kernel"),
    "layers/self_attn/k_proj": ("model.layers.{}.self_attn.k_proj", "kernel"),
    "layers/self_attn/v_proj": ("model.layers.{}.self_attn.v_proj", "kernel"),
    "layers/self_attn/o_proj": ("model.layers.{}.self_attn.o_proj", "kernel"),
    "layers/self_attn/q_norm": ("model.layers.{}.self_attn.q_norm", "scale"),
    "layers/self_attn/k_norm": ("model.layers.{}.self_attn.k_norm", "scale"),
    "layers/post_attention_layernorm": ("model.layers.{}.post_attention_layernorm", "scale"),
    "layers/mlp/gate_proj": ("model.layers.{}.mlp.gate_proj", "kernel"),
    "layers/mlp/up_proj": ("model.layers.{}.mlp.up_proj", "kernel"),
    "layers/mlp/down_proj": ("model.layers.{}.mlp.down_proj", "kernel"),
    "norm": ("model.norm", "scale"),
    "lm_head": ("lm_head", "kernel"),
}
_OURS = {theirs: path for path, (theirs, _) in MODULES.items()}


class Place(NamedTuple):
    """Where one Hugging Face tensor lies here: leaf path, layer (``None`` unstacked), and whether it is transposed.

    torch's Linear keeps (out, in), a Flax kernel (in, out).
    """

    path: str
    layer: int | None
    transposed: bool


def hf_module(path: str, layer: int | None = None) -> str:
    """Hugging Face's name of our module ``path``; ``layer`` counts from 0 and is needed below ``layers``.

    >>> hf_module("layers/mlp/up_proj", 3)
    'model.layers.3.mlp.up_proj'
    """
    if path not in MODULES:
        raise PeftJaxError(f"module '{path}' has no Hugging Face name: {nearest(path, MODULES)}")
    if path.startswith("layers/") == (layer is None):
        raise PeftJaxError(f"module '{path}' {'needs a' if layer is None else 'has no'} layer number.")
    return MODULES[path][0].format(layer)


def our_module(name: str) -> tuple[str, int | None]:
    """The inverse of :func:`hf_module`: our path and the layer, ``None`` outside the stack.

    >>> our_module("model.layers.3.mlp.up_proj")
    ('layers/mlp/up_proj', 3)
    """
    found = re.search(r"\.(\d+)\.", name)
    generic = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    if generic not in _OURS:
        raise PeftJaxError(f"'{name}' is no module of this model family: {nearest(generic, _OURS)}")
    return _OURS[generic], int(found[1]) if found else None


def hf_tensor(path: str, layer: int | None = None) -> str:
    """Hugging Face's name of our leaf ``path``.

    >>> hf_tensor("layers/self_attn/q_proj/kernel", 0), hf_tensor("norm/scale")
    ('model.layers.0.self_attn.q_proj.weight', 'model.norm.weight')
    """
    module, _, leaf = path.rpartition("/")
    name = hf_module(module, layer)
    if leaf not in ("bias", MODULES[module][1]):
        raise PeftJaxError(f"leaf '{path}' has no Hugging Face name: it is no plain weight of the model.")
    return f"{name}.{'bias' if leaf == 'bias' else 'weight'}"


def tensors(paths: list[str], layers: int) -> dict[str, Place]:
    """Every Hugging Face tensor that makes up our leaves ``paths`` in a model of ``layers`` layers, and its place.

    Raises ``PeftJaxError`` for a leaf that Hugging Face's model does not have (a method's own leaf, for example).
    """
    places = {}
    for path in paths:
        for layer in range(layers) if path.startswith("layers/") else [None]:
            places[hf_tensor(path, layer)] = Place(path, layer, path.endswith("/kernel"))
    return places
