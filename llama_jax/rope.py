"""Rotary position embedding, in the half-split layout (Su et al., arXiv:2104.09864)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.types import Array, Float, Int


class RopeTables(NamedTuple):
    """Cosines and sines of every query's angles, float32."""

    cos: Float[Array, "B T half_H"]
    sin: Float[Array, "B T half_H"]


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> RopeTables:
    """The angles position · theta^(-2i/H) for the pairs i < H/2, as cosines and sines.

    Computed in float32 throughout, as Meta's code does, so that long positions
    agree with it.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1.0) / np.float32(theta) ** exponent
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(frequency)
    return RopeTables(jnp.cos(angle), jnp.sin(angle))


def apply_rope(x: Float[Array, "B T N H"], tables: RopeTables) -> Array:
    """Each head turned by its position: pair i is `(x[i], x[i + H/2])`.

    The rotation is done in float32 and returned in the dtype of `x`.
    """
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = tables.cos[:, :, None, :], tables.sin[:, :, None, :]
    turned = (low * cos - high * sin, high * cos + low * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
