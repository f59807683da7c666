"""The tensors of a ``.gguf`` file, read from it one by one: packed blocks as quantised leaves, others as float32.

A block of Q4_0, Q4_1 and Q8_0 is 32 values of a row, first their scale, and of Q4_1 their offset, in float16, then the
codes; byte i of four-bit ones has value i in its low half and value i + 16 in the high one.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax import quant
from peft_jax.hub.formats import gguf, gguf_config, gguf_header

_TYPES = {"Q4_0": "int4", "Q4_1": "int4_affine", "Q8_0": "int8"}
_BLOCK = 32


class Block(NamedTuple):
    """A tensor in a GGUF file, and the heads as ``gguf.hf_name``."""

    info: gguf_header.Info
    heads: int
    by_rows: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    def read(self) -> np.ndarray | quant.QuantizedArray:
        if self.info.kind.name in _TYPES and len(self.shape) == 2:
            return self._packed(self.info.rows().reshape(*self.shape[:-1], self.shape[-1] // _BLOCK, -1))
        return self._ordered(self.info.floats())

    def _packed(self, blocks) -> quant.QuantizedArray:
        """The leaf of bytes (rows, blocks of a row, bytes of a block)."""
        kind = _TYPES[self.info.kind.name]
        halves = 2 if kind == "int4_affine" else 1
        floats = np.ascontiguousarray(blocks[..., :2 * halves]).view(np.float16)
        found = blocks[..., 2 * halves:]
        found = found.view(np.int8) if kind == "int8" else _pairs(found)
        codes, scales = self._ordered(found.reshape(self.shape[0], -1)), self._ordered(floats[..., 0])
        offsets = self._ordered(floats[..., 1]) if halves == 2 else None
        inputs, outputs = (self.shape[:1], self.shape[1:]) if self.by_rows else (self.shape[1:], self.shape[:1])
        return quant.QuantizedArray(codes, scales, offsets=offsets, quant_type=kind, block_size=_BLOCK, inputs=inputs,
                                    outputs=outputs, by_rows=self.by_rows)

    def _ordered(self, rows):
        return gguf.unpermute(rows, self.heads) if self.heads else rows


def _pairs(found: np.ndarray) -> np.ndarray:
    """Bytes (..., 16) with values i and i + 16 as bytes with values 2 i and 2 i + 1, the first in the high half."""
    values = np.concatenate([found & 15, found >> 4], axis=-1)
    return (values[..., ::2] << 4) | values[..., 1::2]


def tensors(path: Path, config: Any) -> dict[str, Block]:
    """``{Hugging Face's name: Block}``; ``config`` is the model's. Raises ``PeftJaxError`` as ``gguf.convert``."""
    heads, blocks = dataclasses.asdict(config), {}
    for name, info in gguf_header.read(path).tensors.items():
        if name != gguf_config.FREQUENCIES:
            theirs, count = gguf.hf_name(name, heads, path)
            blocks[theirs] = Block(info, count, name.startswith("token_embd"))
    return blocks
