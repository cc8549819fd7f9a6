"""Rotary position embedding, in the half-split layout (Su et al., arXiv:2104.09864)."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.types import Array, Float, Int


class RopeTables(NamedTuple):
    """Cosines and sines of each token's angles, float32; B is 1 if all rows agree."""

    cos: Float[Array, "#B T half_H"]
    sin: Float[Array, "#B T half_H"]


def rope_tables(
    positions: Int[Array, "#B T"], config: LlamaConfig, *, num_tokens: int = 0
) -> RopeTables:
    """Compute cosines and sines of position · frequency for each pair of a head.

    In float32 throughout, as in Meta's code, so that long positions agree with it.

    Args:
      positions: of each token; may restart in packed rows.
      config: of the model.
      num_tokens: as of `rope_frequencies`.
    """
    frequency = rope_frequencies(config, num_tokens)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if config.rope_scaling is not None and config.rope_scaling.attention_factor:
        # Of queries and keys, so that the logits of attention have its square.
        factor = np.float32(config.rope_scaling.attention_factor)
        cos, sin = cos * factor, sin * factor
    return RopeTables(cos, sin)


def rope_frequencies(config: LlamaConfig, num_tokens: int = 0) -> np.ndarray:
    """Compute theta^(-2i/H), scaled, for the pairs i < H/2: radians per position.

    Args:
      config: of the model.
      num_tokens: length of the sequence, if it may exceed `config.max_seq_len`; the
        larger of the two decides the base of "dynamic" scaling.

    Returns:
      `[H / 2]` float32.
    """
    theta, scaling = config.rope_theta, config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        length = max(config.max_seq_len, num_tokens)
        theta = _dynamic_theta(theta, scaling, length, config.head_dim)
    half = np.arange(0, config.head_dim, 2, dtype=np.float32)
    exponent = half / np.float32(config.head_dim)
    frequency = np.float32(1.0) / np.float32(theta) ** exponent
    return frequency if scaling is None else _scale(frequency, scaling, theta)


def default_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """The attention factor of "yarn" with wavelengths `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _dynamic_theta(
    theta: float, scaling: RopeScaling, length: int, head_dim: int
) -> float:
    """The base for a context of `length` tokens ("dynamic NTK").

    theta · (factor · length / original - (factor - 1))^(H / (H - 2))
    """
    assert scaling.original_max_seq_len is not None
    stretch = max(length / scaling.original_max_seq_len, 1)
    stretch = scaling.factor * stretch - (scaling.factor - 1)
    return float(theta * stretch ** (head_dim / (head_dim - 2)))


def _scale(frequency: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    """Scale frequencies in float32: interpolate between f / factor and f.

    "llama3": f · (1 - s) / factor + f · s, where s goes from 0 to 1 as the original
    context goes from `low_freq_factor` wavelengths to `high_freq_factor` (Meta's
    published code of Llama 3.1). "yarn": s goes from 1 to 0 linearly in the number of
    the pair, from the one that turns `beta_fast` times in the original context to the
    one that turns `beta_slow` times (the authors' code; arXiv:2309.00071).
    """
    factor, original = np.float32(scaling.factor), scaling.original_max_seq_len
    zero, one = np.float32(0), np.float32(1)
    if scaling.kind == "dynamic":
        return frequency
    if scaling.kind == "linear":
        return frequency / factor
    assert original is not None
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        turns = np.float32(original) / (np.float32(2 * np.pi) / frequency)
        share = (turns - np.float32(low)) / np.float32(high - low)
    else:
        first, last = _yarn_range(scaling, original, theta, 2 * len(frequency))
        pairs = np.arange(len(frequency), dtype=np.float32)
        share = one - (pairs - np.float32(first)) / np.float32(last - first)
    share = np.clip(share, zero, one)
    return (one - share) * frequency / factor + share * frequency


def _yarn_range(
    scaling: RopeScaling, original: int, theta: float, head_dim: int
) -> tuple[float, float]:
    """The pairs between which "yarn" interpolates; fractions if not truncated."""
    assert scaling.beta_fast is not None
    assert scaling.beta_slow is not None
    first, last = (
        head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return first, last + 0.001 if first == last else last


def apply_rope(x: Float[Array, "B T N H"], tables: RopeTables) -> Array:
    """Rotate each head by its position: pair i is `(x[i], x[i + H/2])`.

    Computed in float32, returned in the dtype of `x`.
    """
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables.cos[:, :, None, :], tables.sin[:, :, None, :]
    rotated = (low * cos - high * sin, high * cos + low * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
