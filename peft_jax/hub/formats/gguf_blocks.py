"""The tensors of a ``.gguf`` file, read from it one by one: packed blocks as quantised leaves, others as float32.

A block of Q4_0, Q4_1 and Q8_0 is 32 values of a row, first their scale, and of Q4_1 their offset, in float16, then the
codes; byte i of four-bit ones has value i in its low half and value i + 16 in the high one.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from peft_jax import quant
from peft_jax.errors import PeftJaxError
from peft_jax.hub.formats import gguf

_TYPES = {"Q4_0": "int4", "Q4_1": "int4_affine", "Q8_0": "int8"}
_BLOCK = 32


class Block(NamedTuple):
    """A tensor in a GGUF file: its first byte and their count there, its type, and the heads as ``gguf.hf_name``."""

    file: Path
    start: int
    nbytes: int
    kind: Any
    shape: tuple[int, ...]
    heads: int
    by_rows: bool

    def read(self) -> np.ndarray | quant.QuantizedArray:
        from gguf.quants import dequantize

        # Not from the reader's map of the file: what was read of that counts as this process's memory.
        data = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.start).reshape(*self.shape[:-1], -1)
        if self.kind.name in _TYPES and len(self.shape) == 2:
            return self._packed(data.reshape(*self.shape[:-1], self.shape[-1] // _BLOCK, -1))
        try:
            return self._ordered(np.asarray(dequantize(data, self.kind), np.float32))
        except NotImplementedError as error:
            raise PeftJaxError(f"{self.file} has a tensor of type {self.kind.name}, which is not read.") from error

    def _packed(self, blocks) -> quant.QuantizedArray:
        """The leaf of bytes (rows, blocks of a row, bytes of a block)."""
        kind = _TYPES[self.kind.name]
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
    heads = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    reader, found = gguf.opened(path), {}
    if reader.byte_order == "S":
        raise PeftJaxError(f"{path} is of the other byte order than this machine: load it without a method that "
                           "quantises and without keep_quantised, or write it anew here.")
    for tensor in reader.tensors:
        if tensor.name != "rope_freqs.weight":
            name, count = gguf.hf_name(tensor.name, heads, path)
            shape = tuple(int(size) for size in reversed(tensor.shape))
            found[name] = Block(path, int(tensor.data_offset), int(tensor.n_bytes), tensor.tensor_type, shape, count,
                                tensor.name.startswith("token_embd"))
    return found
