"""The code tables: which number each code stands for, before it is multiplied by its block's scale."""

from functools import cache

import numpy as np

# NormalFloat4, quantiles of N(0, 1) scaled to [-1, 1]: QLoRA, arXiv:2305.14314, appendix E.
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
# bitsandbytes' own FP4: the top bit is the sign, twelfths; 1/16 is its smallest, not E2M1's subnormal.
_TWELFTHS = (0, 1 / 16, 8, 12, 4, 6, 2, 3)
FP4 = tuple(x / 12 for x in _TWELFTHS) + tuple(-x / 12 if x else 0.0 for x in _TWELFTHS)

# What the sixteen codes of each 4-bit type stand for. int4's codes are its integers plus 8.
FOUR_BITS = {"nf4": NF4, "fp4": FP4, "int4": tuple(range(-8, 8)), "int4_affine": tuple(range(16))}
QUANT_TYPES = (*FOUR_BITS, "int8")
# Integers that a symmetric type rounds to, at most: one more than this on the negative side would go unused by half of
# all blocks, or, with scales that have the sign of the largest value, as GGUF's Q4_0 has them, make -w not minus w.
LARGEST = {"int4": 7, "int8": 127}


def table(quant_type: str) -> np.ndarray:
    """float32 (16,): what the codes of a 4-bit type stand for.

    >>> table("fp4")[[3, 11]].tolist()
    [1.0, -1.0]
    """
    return np.array(FOUR_BITS[quant_type], np.float32)


@cache
def byte_table(quant_type: str) -> np.ndarray:
    """float32 (256, 2): what both codes of a byte stand for, the high nibble's first.

    >>> byte_table("int4")[0x7A].tolist()
    [-1.0, 2.0]
    """
    values, byte = table(quant_type), np.arange(256)
    return np.stack([values[byte >> 4], values[byte & 15]], axis=1)


@cache
def steps(quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints float32 (15,) between the sorted values, and uint8 (16,) the codes in that order.

    A number above k midpoints has the k-th code of that order; one that lies on a midpoint goes down.
    """
    values = table(quant_type)
    order = np.argsort(values, kind="stable")
    return midpoints(values[order]), order.astype(np.uint8)


def midpoints(values: np.ndarray) -> np.ndarray:
    return (values[:-1] + values[1:]) / np.float32(2)


@cache
def dynamic() -> np.ndarray:
    """float32 (256,): the signed dynamic 8-bit code, sorted, in which double quantisation keeps the scales.

    Seven decades from 1e-7 to 1, each with twice the fractions of the one below; 8-bit approximations,
    arXiv:1511.04561, as bitsandbytes generates it, to the bit: torch's linspace counts from the nearer end and rounds
    once, which float64 does here; the rest is float32.

    >>> dynamic()[[0, 127, 255]].round(4).tolist() == [np.float32(-0.9930), 0.0, 1.0]
    True
    """
    values = [np.float32(0), np.float32(1)]
    for decade in range(7):
        ends = _linspace(2**decade + 1)
        means = np.float32(10.0 ** (decade - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


def _linspace(count: int) -> np.ndarray:
    """float32 (count,) from 0.1 to 1 with torch's roundings."""
    first, last = np.float32(0.1), np.float32(1)
    step, place = float((last - first) / np.float32(count - 1)), np.arange(count)
    up, down = float(first) + step * place, float(last) - step * (count - 1 - place)
    return np.where(place < count // 2, up, down).astype(np.float32)
