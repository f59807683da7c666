"""What the codes of each quantised type stand for, as float32 tables; a value is its table's entry times a scale.

``nf4`` is NormalFloat (arXiv 2305.14314, appendix E), ``fp4`` bitsandbytes' four-bit float, which has another exponent
bias than E2M1; both in bitsandbytes' order of codes. ``int4`` and ``int4_affine`` are GGUF's Q4_0 and Q4_1.
"""

import numpy as np

_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # of the low three bits; the fourth is the sign

TABLES = {
    "nf4": np.array(_NF4, np.float32),
    "fp4": np.array([*_FP4, *(-value for value in _FP4)], np.float32) / np.float32(12) + np.float32(0),  # no -0
    "int4": np.arange(-8, 8, dtype=np.float32),
    "int4_affine": np.arange(16, dtype=np.float32),
}
TYPES = (*TABLES, "int8")
ABSMAX = {"nf4": 1.0, "fp4": 1.0, "int4": 7.0, "int8": 127.0}  # the entry that a block's largest magnitude gets


def pairs(quant_type: str) -> np.ndarray:
    """float32 (256, 2): both values of each byte, that of the high nibble first."""
    table, byte = TABLES[quant_type], np.arange(256)
    return np.stack([table[byte >> 4], table[byte & 15]], axis=-1)


def dynamic() -> np.ndarray:
    """float32 (256,): the 8-bit dynamic code (arXiv 1511.04561, as in bitsandbytes) of doubly quantised scales, sorted.

    Seven decades of fractions, of both signs, each with twice as many as the one below, and 0 and 1. The bits are those
    of bitsandbytes, so the arithmetic is, too: means in float32, powers of ten in float64.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = _linspace(2**decade + 1)
        means = ((bounds[:-1] + bounds[1:]) / np.float32(2)).astype(np.float32)
        scaled = (means * np.float32(10.0 ** (decade - 6))).astype(np.float32)
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


def _linspace(points: int) -> np.ndarray:
    """float32 from 0.1 to 1, from both ends inward with one rounding each, as torch counts."""
    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(points - 1))
    at = np.arange(points)
    return np.where(at < points // 2, start + step * at, end - step * (points - 1 - at)).astype(np.float32)
