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
from jaxtyping import DTypeLike, Shaped

from llama_jax.kernels.reference import Slots
from llama_jax.model.cache import LayerCache, dtype_of, held, insert, pad_slots
from llama_jax.runtime import Rules
from llama_jax.sharding import axes_size, constrain, divisible, keep_layout
from llama_jax.types import Array, Float, Int, Mesh

AXES = "B K S H"


def begin(
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    num_slots: int,
    dtype: DTypeLike,
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> LayerCache:
    """The cache of rows that begin with these keys and values; its length is 0.

    Args:
      k: keys of the first tokens.
      v: values.
      num_slots: S, at least T.
      dtype: of the cache; int8 has scales.
      rules: how letters map to mesh axes.
      mesh: whose devices.
    """

    def slots_of(new: Array) -> Slots:
        slots = pad_slots(held(new, dtype), num_slots - new.shape[2])
        return _each(constrain, slots, rules, mesh)

    return LayerCache(slots_of(k), slots_of(v), jnp.zeros((k.shape[0],), jnp.int32))


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
        place = PartitionSpec(*place[:3])  # of scales too, which have no H
        new = PartitionSpec(place[0], place[1])
        store = jax.shard_map(
            functools.partial(_store_own, axes=cut),
            mesh=mesh,
            in_specs=(place, new, row),
            out_specs=place,
            check_vma=False,
        )
        new_k, new_v = held(k, dtype_of(cache.k)), held(v, dtype_of(cache.v))
        cache = cache._replace(
            k=store(cache.k, new_k, cache.length), v=store(cache.v, new_v, cache.length)
        )
    # The layout that the cache has anyway, said aloud. Left to itself the TPU
    # compiler turns slots before heads for the time of a decoding loop: the
    # cache is copied on the way in and out, and held twice. The CPU compiler
    # copies it on every step, to repeat the insertion within its reader.
    k, v = (_each(keep_layout, slots, rules, mesh) for slots in (cache.k, cache.v))
    return cache._replace(k=k, v=v)


def _each(function: Any, slots: Slots, rules: Rules, mesh: Mesh | None) -> Any:
    """What a function of an array and its letters makes of slots, scales too."""
    letters = AXES.split()
    return jax.tree.map(
        lambda part: function(part, " ".join(letters[: part.ndim]), rules, mesh), slots
    )


def cut_axes(slots: Slots, rules: Rules, mesh: Mesh) -> Any:
    """The mesh axes that cut S, or None where every device has all slots."""
    names = divisible(slots.shape, AXES, rules, mesh)[2]
    return names if names and axes_size(mesh, names) > 1 else None


def first_slot(slots: Slots, axes: Any) -> Array:
    """The number of the first slot of this device's part, within `shard_map`."""
    return jax.lax.axis_index(axes) * slots.shape[2]


def _store_own(slots: Slots, new: Slots, length: Int[Array, " B"], *, axes: Any) -> Any:
    """A device's slots, with those of the new tokens that fall among them."""
    start = length - first_slot(slots, axes)
    return jax.tree.map(functools.partial(_store, start=start), slots, new)


def _store(
    slots: Shaped[Array, "B K S ..."],
    new: Shaped[Array, "B K T ..."],
    start: Int[Array, " B"],
) -> Array:
    here, count = slots.shape[2], new.shape[2]
    if count > 1:
        place = jnp.arange(here)[None] - start[:, None]
        place = place.reshape(-1, 1, here, *(1 for _ in slots.shape[3:]))
        found = jnp.take_along_axis(new, jnp.clip(place, 0, count - 1), axis=2)
        return jnp.where((place >= 0) & (place < count), found, slots)
    # One slot of each row is rewritten, with what it had where another device has it:
    # in place, as all slots would not be.
    for row in range(slots.shape[0]):
        at = (row, 0, jnp.clip(start[row], 0, here - 1), 0)[: slots.ndim]
        one = (1, slots.shape[1], 1, *slots.shape[3:])
        had = jax.lax.dynamic_slice(slots, at, one)
        mine = (start[row] >= 0) & (start[row] < here)
        slots = jax.lax.dynamic_update_slice(
            slots, jnp.where(mine, new[row : row + 1], had), at
        )
    return slots
