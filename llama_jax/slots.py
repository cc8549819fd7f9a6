"""The slots of a cache on a mesh: begun, written, and kept where they lie.

Where K divides by `tensor`, each device has its heads' slots, and all there is to do is
local. Where it does not, or on a `sequence` axis, S is cut too (`sharding.divisible`):
then each device writes the slots that are its own.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llama_jax.cache import LayerCache, insert
from llama_jax.runtime import Rules
from llama_jax.sharding import axes_size, constrain, divisible, keep_layout
from llama_jax.types import Array, Float, Int, Mesh

AXES = "B K S H"


def begin(
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    num_slots: int,
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> LayerCache:
    """The cache of rows that begin with these keys and values; its length is 0."""
    pad = ((0, 0), (0, 0), (0, num_slots - k.shape[2]), (0, 0))
    k, v = (constrain(jnp.pad(new, pad), AXES, rules, mesh) for new in (k, v))
    return LayerCache(k, v, jnp.zeros((k.shape[0],), jnp.int32))


def write(
    cache: LayerCache,
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> LayerCache:
    """`cache.insert`, done in place by every compiler, on a mesh too."""
    cut = None if mesh is None else cut_axes(cache.k, rules, mesh)
    if mesh is None or cut is None:
        cache = insert(cache, k, v)
    else:
        place = divisible(cache.k.shape, AXES, rules, mesh)
        row = PartitionSpec(place[0])
        new = PartitionSpec(place[0], place[1])
        store = jax.shard_map(
            functools.partial(_store_own, axes=cut),
            mesh=mesh,
            in_specs=(place, new, row),
            out_specs=place,
            check_vma=False,
        )
        cache = cache._replace(
            k=store(cache.k, k, cache.length), v=store(cache.v, v, cache.length)
        )
    # The layout that the cache has anyway, said aloud. Left to itself the TPU
    # compiler turns slots before heads for the time of a decoding loop: the
    # cache is copied on the way in and out, and held twice. The CPU compiler
    # copies it on every step, to repeat the insertion within its reader.
    k, v = (keep_layout(slots, AXES, rules, mesh) for slots in (cache.k, cache.v))
    return cache._replace(k=k, v=v)


def cut_axes(slots: Array, rules: Rules, mesh: Mesh) -> Any:
    """The mesh axes that cut S, or None where every device has all slots."""
    names = divisible(slots.shape, AXES, rules, mesh)[2]
    return names if names and axes_size(mesh, names) > 1 else None


def first_slot(slots: Array, axes: Any) -> Array:
    """The number of the first slot of this device's part, within `shard_map`."""
    return jax.lax.axis_index(axes) * slots.shape[2]


def _store_own(
    slots: Float[Array, "B K S H"],
    new: Float[Array, "B K T H"],
    length: Int[Array, " B"],
    *,
    axes: Any,
) -> Array:
    """A device's slots, with those of the new tokens that fall among them."""
    here, count = slots.shape[2], new.shape[2]
    start = length - first_slot(slots, axes)
    new = new.astype(slots.dtype)
    if count > 1:
        place = jnp.arange(here)[None] - start[:, None]
        found = jnp.take_along_axis(
            new, jnp.clip(place, 0, count - 1)[:, None, :, None], axis=2
        )
        mine = (place >= 0) & (place < count)
        return jnp.where(mine[:, None, :, None], found, slots)
    # One slot of each row is rewritten, with what it had where another device has it:
    # in place, as all slots would not be.
    for row in range(slots.shape[0]):
        at = (row, 0, jnp.clip(start[row], 0, here - 1), 0)
        had = jax.lax.dynamic_slice(slots, at, (1, slots.shape[1], 1, slots.shape[3]))
        mine = (start[row] >= 0) & (start[row] < here)
        slots = jax.lax.dynamic_update_slice(
            slots, jnp.where(mine, new[row : row + 1], had), at
        )
    return slots
