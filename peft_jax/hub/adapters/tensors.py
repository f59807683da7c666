"""The tensors of an adapter's file against the leaves that they are to fill."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax import errors
from peft_jax.core import tree
from peft_jax.core.peft_format import PREFIX
from peft_jax.errors import PeftJaxError
from peft_jax.method import FROZEN, Method

TIED = (f"{PREFIX}lm_head.weight", f"{PREFIX}lm_head.base_layer.weight")  # which peft stores of a tied head as well
MOST_LAYERS = 1000  # a leaf of a scanned stack is padded to its largest layer, and so larger than its tensors


def check_sizes(method: Method, init: Callable[[], tree.Tree], folder: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise ``PeftJaxError``, before ``init`` makes any, for leaves that are far too large for the file to fill."""
    size = sum(tensor.size for tensor in tensors.values())
    try:
        params = jax.eval_shape(init)
        labels, flat = tree.flatten(method.labels(params)), tree.flatten(params)
        need = sum(leaf.size for path, leaf in flat.items() if labels[path] != FROZEN)
    except (MemoryError, OverflowError):
        need = np.inf
    if need > MOST_LAYERS * size:
        raise PeftJaxError(f"the config of the adapter in {folder} asks for {need:.0g} numbers to train, its file has "
                           f"{size}: one of them is damaged; save the adapter again.")


def check(folder, tensors, slots, flat, own, base) -> None:
    """One error that lists every tensor that is missing, unexpected or of another shape."""
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
        "with NaN or infinite values": [key for key in shapes.keys() & tensors.keys() if not _is_finite(tensors[key])],
    }
    if text := errors.faults_text(faults):
        raise PeftJaxError(f"the adapter in {folder} does not fit the model or its own config. {text}.")


def _is_finite(tensor) -> bool:
    return not jnp.issubdtype(tensor.dtype, jnp.floating) or bool(np.isfinite(tensor.astype(np.float32)).all())


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
    return weight.shape == tensor.shape and bool((weight == tensor.astype(weight.dtype)).all())


def leaves_of(tensors, slots, flat) -> dict[str, jax.Array]:
    """The leaves that the file holds; what it does not say of them is as the method starts it."""
    leaves = {slot.path: np.array(flat[slot.path], np.float32) for slot in slots.values()}
    for key, slot in slots.items():
        slot.fill(leaves[slot.path], tensors[key])
    return {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
