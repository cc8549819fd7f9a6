"""The key/value cache: a value that goes into the model and comes out of it.

The slot of a token is its absolute position, in every row. A query at slot p sees the
slots ≤ p, so what lies beyond a row's length (padding, a finished neighbour's last
writes) needs no mask of its own: it is overwritten before anything can see it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.types import Array, Float, Int


class KVCache(NamedTuple):
    """One array per layer, heads before slots, so that a head's slots lie together."""

    k: tuple[Float[Array, "B K S H"], ...]
    v: tuple[Float[Array, "B K S H"], ...]
    length: Int[Array, " B"]

    @property
    def num_slots(self) -> int:
        """S, the same in every layer."""
        return self.k[0].shape[2]


class LayerCache(NamedTuple):
    """What one block needs of the cache."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    length: Int[Array, " B"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NewCache:
    """Where a cache is given: begin one of so many slots with these tokens."""

    num_slots: int


def init_cache(
    config: LlamaConfig, batch: int, num_slots: int, dtype: DTypeLike
) -> KVCache:
    """An empty cache of `2 · L · B · K · S · H` numbers."""
    shape = (batch, config.num_kv_heads, num_slots, config.head_dim)
    empty = [jnp.zeros(shape, dtype) for _ in range(2 * config.num_layers)]
    return KVCache(
        k=tuple(empty[: config.num_layers]),
        v=tuple(empty[config.num_layers :]),
        length=jnp.zeros((batch,), jnp.int32),
    )


def insert(
    layer: LayerCache, k: Float[Array, "B K T H"], v: Float[Array, "B K T H"]
) -> LayerCache:
    """Keys and values written behind each row's length; the length stays.

    The caller makes sure that `length + T ≤ S`: an update that sticks out would be
    moved, not cut.
    """

    # A loop over the rows, not a scatter: a slice update at a traced offset is done
    # in place by every compiler, also where the cache is donated or carried.
    def write(slots: Array, new: Array) -> Array:
        for row in range(new.shape[0]):
            start = (row, 0, layer.length[row], 0)
            slots = jax.lax.dynamic_update_slice(slots, new[row : row + 1], start)
        return slots

    return layer._replace(
        k=write(layer.k, k.astype(layer.k.dtype)),
        v=write(layer.v, v.astype(layer.v.dtype)),
    )


def grow(cache: KVCache, num_slots: int) -> KVCache:
    """The same contents in a cache of more slots."""
    more = num_slots - cache.num_slots
    if more < 0:
        raise ValueError(f"cannot shrink {cache.num_slots} slots to {num_slots}")
    pad = ((0, 0), (0, 0), (0, more), (0, 0))
    return cache._replace(
        k=tuple(jnp.pad(layer, pad) for layer in cache.k),
        v=tuple(jnp.pad(layer, pad) for layer in cache.v),
    )
