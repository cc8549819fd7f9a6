"""Rotary position embedding, in the half-split layout (Su et al., arXiv:2104.09864)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.config import RopeScaling
from llama_jax.types import Array, Float, Int


class RopeTables(NamedTuple):
    """Cosines and sines of each token's angles, float32; B is 1 if all rows agree."""

    cos: Float[Array, "#B T half_H"]
    sin: Float[Array, "#B T half_H"]


def rope_tables(
    positions: Int[Array, "#B T"],
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
) -> RopeTables:
    """Compute cosines and sines of position · theta^(-2i/H) for the pairs i < H/2.

    In float32 throughout, as in Meta's code, so that long positions agree with it.

    Args:
      positions: of each token; may restart in packed rows.
      head_dim: H.
      theta: base of the frequencies.
      scaling: of the frequencies, if the model was trained with any.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1.0) / np.float32(theta) ** exponent
    if scaling is not None:
        frequency = scale_frequencies(frequency, scaling)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    return RopeTables(jnp.cos(angle), jnp.sin(angle))


def scale_frequencies(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Scale frequencies (radians per position, float32).

    "linear": f / factor. "llama3": f · (1 - s) / factor + f · s, where s goes from 0
    to 1 as the original context goes from `low_freq_factor` wavelengths to
    `high_freq_factor` (Meta's published code of Llama 3.1).
    """
    factor = np.float32(scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_seq_len
    if low is None or high is None or original is None:
        return frequency / factor
    wavelength = np.float32(2 * np.pi) / frequency
    turns = np.float32(original) / wavelength
    share = (turns - np.float32(low)) / np.float32(high - low)
    share = np.clip(share, np.float32(0), np.float32(1))
    return (1 - share) * frequency / factor + share * frequency


def apply_rope(x: Float[Array, "B T N H"], tables: RopeTables) -> Array:
    """Rotate each head by its position: pair i is `(x[i], x[i + H/2])`.

    Computed in float32, returned in the dtype of `x`.
    """
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables.cos[:, :, None, :], tables.sin[:, :, None, :]
    rotated = (low * cos - high * sin, high * cos + low * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
