"""The tensors of an adapter's file against the leaves that they are to fill."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import errors
from peft_jax.core import tree
from peft_jax.core.peft_format import PREFIX, Slot
from peft_jax.errors import PeftJaxError
from peft_jax.hub.formats.safetensors_files import Tensor
from peft_jax.hub.stacking import finite
from peft_jax.method import FROZEN, Method

Tensors = Mapping[str, Tensor]
TIED = (f"{PREFIX}lm_head.weight", f"{PREFIX}lm_head.base_layer.weight")  # which peft stores of a tied head as well
MOST_SHARE, SMALL = 64, 1 << 26  # numbers in an adapter by those of its model, and what any may have
MOST_SIZE = 1 << 20  # of what an adapter has many of in one module: ranks, virtual tokens
NO_SIZES = {"tinit", "tfinal", "deltaT", "total_step", "projection_prng_key", "token_indices", "layers_to_transform",
            "leave_out", "last_n_layers"}
MOST_LAYERS = 1000  # a leaf of a scanned stack is padded to its largest layer, and so larger than its tensors


def check_sizes(method: Method, init: Callable[[], tree.Tree], folder: Path, tensors: Tensors, base: Any) -> None:
    """Raise ``PeftJaxError``, before ``init`` makes any, for leaves that are far too large for the file to fill, or for
    an adapter of the model ``base``: the file may be one of holes, which takes no place on a disk."""
    size, whole = (sum(one.size for one in some) for some in (tensors.values(), tree.flatten(base).values()))
    try:
        _check_numbers(method.config)
        params = jax.eval_shape(init)
        labels, flat = tree.flatten(method.labels(params)), tree.flatten(params)
        need = sum(leaf.size for path, leaf in flat.items() if labels[path] != FROZEN)
    except (MemoryError, OverflowError):
        need = np.inf
    if need > MOST_LAYERS * size:
        raise PeftJaxError(f"the config of the adapter in {folder} asks for {need:.0g} numbers to train, its file has "
                           f"{size}: one of them is damaged; save the adapter again.")
    if need > max(MOST_SHARE * whole, SMALL):
        raise PeftJaxError(f"the config of the adapter in {folder} asks for {need:.0g} numbers to train, and the model "
                           f"has {whole:,}: it is of a larger model, or damaged.")


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ``OverflowError`` for a size, such as a rank, that not even a list can be made of."""
    for name in config.keys() - NO_SIZES:
        value = config[name]
        several = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(one, int) and one > MOST_SIZE for one in several):
            raise OverflowError(f"{name} is over {MOST_SIZE}")


def check(folder, tensors, slots, flat, own, base) -> None:
    """One error that lists every tensor that is missing, unexpected or of another shape."""
    for tensor in tensors.values():
        tensor.check_type()
    if bare := [key for key in tensors if not key.startswith(PREFIX) and key not in slots]:
        raise PeftJaxError(f"the adapter in {folder} has {len(bare)} tensors without peft's '{PREFIX}' in front, the "
                           f"first is '{bare[0]}': save it with peft's save_pretrained.")
    shapes = {key: slot.tensor(np.broadcast_to(np.int8(0), flat[slot.path].shape)).shape for key, slot in slots.items()}
    faults = {
        "missing": sorted(shapes.keys() - tensors.keys()),
        "unexpected": [key for key in sorted(tensors.keys() - shapes.keys())
                       if not _says_nothing_new(key, tensors[key], slots, own, base)],
        "of another shape": [f"{key} is {list(tensors[key].shape)}, the model needs {list(shape)}"
                             for key, shape in sorted(shapes.items())
                             if key in tensors and tensors[key].shape != shape],
        "of no floating-point type": [f"{key} is {tensors[key].dtype}" for key in sorted(shapes.keys() & tensors.keys())
                                      if not jnp.issubdtype(tensors[key].dtype, jnp.floating)],
    }
    if text := errors.faults_text(faults):
        raise PeftJaxError(f"the adapter in {folder} does not fit the model or its own config. {text}.")


def _says_nothing_new(key: str, tensor, slots, own, base) -> bool:
    """peft also stores biases of saved modules twice more, and an adapted head's or resized embedding's base weight.

    The latter may stand in the file as long as it is the base model's own.
    """
    if re.sub(r"\.(original_module|modules_to_save)\.", ".", key) in slots:
        return True
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    embedding = next((name for name, slot in own.items() if slot.path.endswith("/embedding")), "")
    slot = own.get(name) or (own.get(embedding) if key in TIED else None)
    if slot is None:
        return False
    weight = slot.tensor(np.asarray(base[slot.path]))
    return weight.shape == tensor.shape and bool((weight == tensor.read().astype(weight.dtype)).all())


def leaves_of(folder: Path, tensors: Tensors, slots: Mapping[str, Slot], flat: Mapping[str, Any],
              base: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The leaves that the file holds; what it does not say of them is as the method starts it.

    Raises ``PeftJaxError`` for tensors with what is no number, or none in the type that the model ``base`` computes in.
    """
    leaves = {slot.path: np.array(flat[slot.path], np.float32) for slot in slots.values()}
    dtype, faults = _narrowest(base), {"with NaN or infinite values": [], "with values beyond the model's type": []}
    most = float(jnp.finfo(dtype).max)
    for key, slot in slots.items():
        tensor = tensors[key].read()
        if not finite(tensor):
            faults["with NaN or infinite values"].append(key)
        elif float(jnp.finfo(tensor.dtype).max) > most and not (np.abs(tensor) <= most).all():
            faults["with values beyond the model's type"].append(f"{key} ({dtype})")
        else:
            slot.fill(leaves[slot.path], tensor)
    if text := errors.faults_text(faults):
        raise PeftJaxError(f"the adapter in {folder} does not fit the model or its own config. {text}.")
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}


def _narrowest(base: Mapping[str, Any]) -> Any:
    """The type of the model's floats that ends first; a leaf of the adapter is float32."""
    dtypes = {jnp.dtype(leaf.dtype) for leaf in base.values() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return min(dtypes | {jnp.dtype("float32")}, key=lambda dtype: float(jnp.finfo(dtype).max))
