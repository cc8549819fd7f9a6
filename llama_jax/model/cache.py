"""The key/value cache: a value that goes into the model and comes out of it.

The slot of a token is its absolute position, in every row. A query at slot p sees the
slots ≤ p, so what lies beyond a row's length (padding, a finished neighbour's last
writes) needs no mask of its own: it is overwritten before anything can see it.

Slots may be held in eight bits, with scales (`kernels.QuantizedSlots`). Then a token's
keys and values are rounded once, when they are written, and never again.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from llama_jax.config import LlamaConfig
from llama_jax.kernels.quantized_slots import QuantizedSlots, quantize_slots
from llama_jax.kernels.reference import Slots
from llama_jax.types import Array, Float, Int


class KVCache(NamedTuple):
    """Slots of each layer apart, heads before slots: a head's slots lie together.

    Attributes:
      k: keys of each layer, an array or `QuantizedSlots`.
      v: values, likewise.
      length: how many slots of each row count.
    """

    k: tuple[Slots, ...]
    v: tuple[Slots, ...]
    length: Int[Array, " B"]

    @property
    def num_slots(self) -> int:
        """S, the same in every layer."""
        return self.k[0].shape[2]


class LayerCache(NamedTuple):
    """What one block needs of the cache."""

    k: Slots
    v: Slots
    length: Int[Array, " B"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class NewCache:
    """Where a cache is given: begin one of so many slots with these tokens."""

    num_slots: int


def init_cache(
    config: LlamaConfig, batch: int, num_slots: int, dtype: DTypeLike
) -> KVCache:
    """An empty cache of `2 · L · B · K · S · H` numbers; int8 ones have scales."""
    shape = (batch, config.num_kv_heads, num_slots, config.head_dim)

    def zeros() -> Slots:
        slots = jnp.zeros(shape, dtype)
        if slots.dtype != jnp.int8:
            return slots
        return QuantizedSlots(slots, jnp.zeros(shape[:3], jnp.float32))

    # Each its own: a buffer that is there twice cannot be donated.
    empty = [zeros() for _ in range(2 * config.num_layers)]
    return KVCache(
        k=tuple(empty[: config.num_layers]),
        v=tuple(empty[config.num_layers :]),
        length=jnp.zeros((batch,), jnp.int32),
    )


def held(new: Float[Array, "B K T H"], dtype: DTypeLike) -> Slots:
    """Keys or values as a cache of this dtype has them."""
    eight = jnp.dtype(dtype) == jnp.int8
    return quantize_slots(new) if eight else new.astype(dtype)


def dtype_of(slots: Slots) -> DTypeLike:
    """What a cache holds its numbers in."""
    return (slots.values if isinstance(slots, QuantizedSlots) else slots).dtype


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
            start = (row, 0, layer.length[row], 0)[: slots.ndim]
            slots = jax.lax.dynamic_update_slice(slots, new[row : row + 1], start)
        return slots

    return layer._replace(
        k=jax.tree.map(write, layer.k, held(k, dtype_of(layer.k))),
        v=jax.tree.map(write, layer.v, held(v, dtype_of(layer.v))),
    )


def grow(cache: KVCache, num_slots: int) -> KVCache:
    """The same contents in a cache of more slots."""
    more = num_slots - cache.num_slots
    if more < 0:
        raise ValueError(f"cannot shrink {cache.num_slots} slots to {num_slots}")
    return cache._replace(k=pad_slots(cache.k, more), v=pad_slots(cache.v, more))


def pad_slots(slots: Any, more: int) -> Any:
    """Slots, or a tree of them, with so many empty ones behind."""
    pad = ((0, 0), (0, 0), (0, more), (0, 0))
    return jax.tree.map(lambda part: jnp.pad(part, pad[: part.ndim]), slots)
