"""Checkpoints that bitsandbytes quantised in four bits, as transformers saves them.

Beside each ``weight``, whose bytes are the packed codes, stand ``weight.absmax``, ``weight.quant_map``, of doubly
quantised scales ``weight.nested_absmax`` and ``weight.nested_quant_map``, and ``weight.quant_state.bitsandbytes__nf4``
(or ``fp4``): JSON in a uint8 tensor. Bytes and scales are taken as they are.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax import quant
from peft_jax.core.validation import is_finite
from peft_jax.errors import PeftJaxError
from peft_jax.method import Method
from peft_jax.methods.quantize import quantize
from peft_jax.quant import codebooks
from peft_jax.quant.decode import GROUP
from peft_jax.quant.encode import BLOCK_SIZES
from peft_jax.quant.qarray import is_flat

_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_INSTEAD = ("take the plain model, load_pretrained(..., method=quantize(...)), or dequantize() this one with "
            "transformers and save it")


_SETTINGS = {"quant_method": str | None, "load_in_8bit": bool | None, "load_in_4bit": bool | None,
             "bnb_4bit_quant_type": str | None, "bnb_4bit_use_double_quant": bool | None,
             "llm_int8_skip_modules": list | None}
_MOST_STATE = 1 << 16  # bytes of a quant_state, which has two hundred


class Packed(NamedTuple):
    """A quantised weight: its tensors by part, "" for the codes, and its state; ``shape`` is (outputs, inputs)."""

    name: str
    parts: Mapping[str, Any]
    state: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.state["shape"])

    def read(self) -> quant.QuantizedArray:
        """The entry of a stack, buffers in numpy. Raises ``PeftJaxError`` where parts do not fit each other."""
        outputs, inputs = self.shape
        block, kind = self.state["blocksize"], self.state["quant_type"]
        rows = 1 if is_flat(kind, inputs, block) else outputs
        count = rows * -(-inputs * outputs // rows // block)
        self._check_table("quant_map", codebooks.table(kind))
        packed = self._part("", np.uint8, -(-inputs * outputs // 2)).reshape(rows, -1)
        double = "nested_absmax" in self.parts
        scales = self._part("absmax", np.uint8 if double else np.float32, count).reshape(rows, -1)
        nested, mean = self._nested(count) if double else (None, None)
        return quant.QuantizedArray(packed, scales, nested, mean, quant_type=kind, block_size=block, inputs=(inputs,),
                                    outputs=(outputs,))

    def unread(self, why: str) -> PeftJaxError:
        """What to raise where this weight is not read."""
        return PeftJaxError(f"the quantised weight '{self.name}' {why}: {_INSTEAD}.")

    def _nested(self, count):
        self._check_table("nested_quant_map", codebooks.dynamic())
        if self.state.get("nested_blocksize") != GROUP or not is_finite(self.state.get("nested_offset")):
            raise self._damaged(f"scales in blocks of {self.state.get('nested_blocksize')} with the mean "
                                f"{self.state.get('nested_offset')}, and only blocks of {GROUP} with a mean are read")
        return (self._part("nested_absmax", np.float32, -(-count // GROUP)),
                np.asarray(self.state["nested_offset"], np.float32))

    def _part(self, part, dtype, size) -> np.ndarray:
        if part not in self.parts:
            raise self._damaged(f"no {part or 'codes'}")
        value = self.parts[part].read().reshape(-1)
        if part == "":  # kept in another dtype by bnb_4bit_quant_storage
            value = value.view(np.uint8)
        if value.dtype != dtype or value.size != size:
            raise self._damaged(f"{part or 'codes'} of {value.size} {value.dtype} instead of {size} {np.dtype(dtype)}")
        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise self._damaged(f"NaN or infinite values in {part}")
        return value

    def _check_table(self, part, table) -> None:
        if not np.array_equal(self._part(part, np.float32, table.size), table):
            raise self._damaged(f"another {part} than bitsandbytes' for {self.state['quant_type']}, so its codes stand "
                                "for other values")

    def _damaged(self, what) -> PeftJaxError:
        return PeftJaxError(f"the quantised weight '{self.name}' has {what}: fetch the checkpoint again, or "
                            f"{_INSTEAD}.")


def gather(folder: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``found``, a checkpoint's tensors by name, with those of each quantised weight as one :class:`Packed`.

    ``given`` is the config dict. Raises ``PeftJaxError`` for a kind of quantisation that is not read, and for weights
    of which parts are missing.
    """
    settings = _settings(folder, given)
    weights = {name.partition(_STATE)[0]: name for name in found if _STATE in name}
    parts = {weight: _parts(weight, found) for weight in weights}
    taken = {f"{weight}.{part}" if part else weight for weight, group in parts.items() for part in group}
    rest = {name: tensor for name, tensor in found.items() if name not in taken and _STATE not in name}
    if lone := [name for name in rest if name.endswith(tuple(f".weight.{part}" for part in _PARTS))]:
        raise PeftJaxError(f"{folder} has '{lone[0]}' and not the quant_state of that weight ({len(lone)} such "
                           "tensors): fetch the checkpoint again.")
    return rest | {weight: Packed(weight, parts[weight], _state(weights[weight], found, settings))
                   for weight in weights}


def _parts(weight, found) -> dict[str, Any]:
    named = {part: f"{weight}.{part}" if part else weight for part in ("", *_PARTS)}
    return {part: found[name] for part, name in named.items() if name in found}


def _settings(folder, given) -> Mapping[str, Any]:
    settings = given.get("quantization_config") or {}
    if not isinstance(settings, Mapping):
        raise PeftJaxError(f"{folder}/config.json has a quantization_config that is no object: fetch it again.")
    for key, kinds in _SETTINGS.items():
        if not isinstance(settings.get(key), kinds):
            raise PeftJaxError(f"{folder}/config.json has a quantization_config with {key}={settings[key]!r:.60}: "
                               "fetch it again.")
    method = settings.get("quant_method", "bitsandbytes" if settings else None)
    if method not in (None, "bitsandbytes"):
        raise PeftJaxError(f"{folder} is quantised by '{method}', which is not read, only bitsandbytes' four bits are: "
                           f"{_INSTEAD}.")
    if settings.get("load_in_8bit"):
        raise PeftJaxError(f"{folder} is quantised by LLM.int8(), whose values no leaf here stands for to the bit, nor "
                           f"its products of 8-bit activations: {_INSTEAD}.")
    return settings


def _state(name, found, settings) -> dict[str, Any]:
    """The JSON in the tensor ``name``, checked. Nothing but JSON is ever read from it."""
    try:
        if math.prod(found[name].shape) > _MOST_STATE:
            raise ValueError("too long")
        state = json.loads(found[name].read().astype(np.uint8, casting="no").tobytes().decode("utf-8"))
        shape, block, kind = state["shape"], state["blocksize"], state["quant_type"]
        whole = len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PeftJaxError(f"'{name}' holds no quant_state as bitsandbytes writes it: fetch it again.") from error
    wanted = settings.get("bnb_4bit_quant_type", kind)
    if not whole or type(block) is not int or block not in BLOCK_SIZES or kind not in ("nf4", "fp4"):
        raise PeftJaxError(f"'{name}' says {kind} in blocks of {block} for a weight of shape {shape}, and only nf4 and "
                           f"fp4 matrices in blocks of {', '.join(map(str, BLOCK_SIZES))} are read: {_INSTEAD}.")
    if kind != wanted or not name.endswith(kind):
        raise PeftJaxError(f"'{name}' says {kind}, and config.json {wanted}: fetch the checkpoint again.")
    return state


def planned(folder: Path, given: Mapping[str, Any]) -> Method | None:
    """What transformers makes of all kernels by the config dict, as a method; ``None`` where it says nothing of that.

    Blocks, of which it does not speak, are of 64 values. Raises ``PeftJaxError`` as :func:`gather` does.
    """
    settings = _settings(folder, given)
    if not settings.get("load_in_4bit"):
        return None
    return quantize(settings.get("bnb_4bit_quant_type", "fp4"), 64, settings.get("bnb_4bit_use_double_quant", False),
                    exclude_modules=tuple(settings.get("llm_int8_skip_modules") or ()))


def written(name: str, entry: quant.QuantizedArray) -> dict[str, np.ndarray]:
    """The tensors of a weight's quantised entry, (outputs, inputs), as transformers saves them."""
    codes_of, table = (np.ascontiguousarray(np.asarray(entry.codes)).reshape(-1, 1), codebooks.table(entry.quant_type))
    state = {"quant_type": entry.quant_type, "blocksize": entry.block_size, "dtype": entry.plain_dtype,
             "shape": [math.prod(entry.outputs), math.prod(entry.inputs)]}
    found = {name: codes_of, f"{name}.absmax": np.asarray(entry.scales).reshape(-1), f"{name}.quant_map": table}
    if entry.double_quant:
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": float(entry.mean)}
        found |= {f"{name}.nested_absmax": np.asarray(entry.nested).reshape(-1),
                  f"{name}.nested_quant_map": codebooks.dynamic()}
    text = json.dumps(state).encode()
    return found | {f"{name}{_STATE}{entry.quant_type}": np.frombuffer(text, np.uint8)}


def described(packed: Mapping[str, quant.QuantizedArray], plain: Collection[str]) -> dict[str, Any]:
    """What config.json says of quantised weights: ``{path: leaf}``, and of modules that are not, by name.

    Raises ``PeftJaxError`` for leaves that bitsandbytes cannot hold, or not beside each other.
    """
    for path, leaf in packed.items():
        if leaf.quant_type not in ("nf4", "fp4") or leaf.by_rows or leaf.block_size == 0:
            blocks = f"blocks of {leaf.block_size}" if leaf.block_size else "one block a row"
            what = "an embedding" if leaf.by_rows else f"{leaf.quant_type} in {blocks}"
            raise PeftJaxError(f"'{path}' is {what}, and quantised weights are saved as bitsandbytes', which has nf4 "
                               "and fp4 kernels alone: save quantize().merge(params), which is plain.")
    kinds = {(leaf.quant_type, leaf.double_quant) for leaf in packed.values()}
    if len(kinds) > 1:
        raise PeftJaxError(f"the weights are quantised in several ways, {sorted(kinds)}, and a checkpoint of "
                           "bitsandbytes has one: save quantize().merge(params), which is plain.")
    (kind, double), = kinds
    dtype = next(iter(packed.values())).plain_dtype
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(plain)}
