"""Rotary positions (arXiv 2104.09864), half-split pairs as Hugging Face lays them out, with the published scalings."""

import math

import jax.numpy as jnp
import numpy as np

from peft_jax.errors import PeftJaxError, nearest


def _llama3(inverse: np.ndarray, scaling: dict) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths slowed by ``factor``, short ones kept, a linear ramp between."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inverse / (2 * math.pi)
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inverse * ((1 - ramp) / factor + ramp)


def _linear(inverse: np.ndarray, scaling: dict) -> np.ndarray:
    return inverse / scaling["factor"]


def _default(inverse: np.ndarray, scaling: dict) -> np.ndarray:
    return inverse


SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3}


def inverse_frequencies(head_dim: int, theta: float, scaling: tuple[tuple[str, float | str], ...] | None) -> np.ndarray:
    """Radians per position of each pair, float32 (head_dim / 2,). Raises ``PeftJaxError`` for an unknown scaling."""
    inverse = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    options = dict(scaling or (("rope_type", "default"),))
    kind = options["rope_type"]
    if kind not in SCALINGS:
        raise PeftJaxError(f"rope scaling '{kind}' is not supported: {nearest(str(kind), SCALINGS)}")
    return SCALINGS[kind](inverse, options).astype(np.float32)


def angles(positions: jnp.ndarray, inverse: np.ndarray) -> tuple[jnp.ndarray, jnp.ndarray]:
    """Cosine and sine for ``positions`` (batch, seq): two float32 arrays (batch, seq, 1, head_dim / 2)."""
    radians = positions[:, :, None, None].astype(jnp.float32) * inverse
    return jnp.cos(radians), jnp.sin(radians)


def rotate(x: jnp.ndarray, cos: jnp.ndarray, sin: jnp.ndarray) -> jnp.ndarray:
    """Turn ``x`` (batch, seq, heads, head_dim) by the angles, in float32, back to its dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
