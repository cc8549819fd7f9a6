"""Random queries, keys and values for tests of attention."""

from typing import Any

import jax.numpy as jnp
import numpy as np

B, T, H = 3, 6, 8


def inputs(n: int, k: int, slots: int = T, seed: int = 0) -> list[Any]:
    """Random q, k and v, the latter two with heads before slots."""
    rng = np.random.default_rng(seed)
    shapes = (B, T, n, H), (B, k, slots, H), (B, k, slots, H)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
