"""Slots of keys or values, `[B, K, S, H]`: encoded, created and written, on a mesh too.

Where K divides by `tensor`, each device has all slots of its heads and writes locally.
Where it does not, or on a `sequence` axis, S is cut too (`activation_spec`): each
device writes the slots that fall into its part.

All functions take an array or `QuantizedSlots`, whose scales have no H.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import DTypeLike, Shaped

from llama_jax.kernels.quantized_slots import QuantizedSlots, quantize_slots
from llama_jax.kernels.reference import Slots
from llama_jax.runtime import MeshAxes, Rules
from llama_jax.sharding import activation_spec, axes_size, constrain, constrain_layout
from llama_jax.types import Array, Float, Int, Mesh

AXES = "B K S H"

SlotsT = TypeVar("SlotsT", bound=Array | QuantizedSlots)


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Slots:
    """Empty slots (or pages) of a dtype; int8 ones have scales."""
    slots = jnp.zeros(shape, dtype)
    if slots.dtype != jnp.int8:
        return slots
    return QuantizedSlots(slots, jnp.zeros(shape[:-1], jnp.float32))


def encode(new: Float[Array, "*B K T H"], dtype: DTypeLike) -> Slots:
    """Keys or values as a cache of this dtype stores them: cast, or quantized to int8.

    A token's keys and values are rounded here, once, and never again.
    """
    is_int8 = jnp.dtype(dtype) == jnp.int8
    return quantize_slots(new) if is_int8 else new.astype(dtype)


def dtype_of(slots: Slots) -> DTypeLike:
    """The dtype in which slots are stored; of `QuantizedSlots`, int8."""
    return (slots.values if isinstance(slots, QuantizedSlots) else slots).dtype


def pad_slots(slots: SlotsT, extra: int) -> SlotsT:
    """Slots followed by `extra` empty ones."""
    pad = ((0, 0), (0, 0), (0, extra), (0, 0))
    return jax.tree.map(lambda part: jnp.pad(part, pad[: part.ndim]), slots)


def start(new: SlotsT, num_slots: int, *, rules: Rules, mesh: Mesh | None) -> SlotsT:
    """`num_slots` slots whose first T are encoded keys or values."""
    return _each(constrain, pad_slots(new, num_slots - new.shape[2]), rules, mesh)


def write(
    slots: SlotsT,
    new: SlotsT,
    length: Int[Array, " B"],
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> SlotsT:
    """Write T encoded keys or values after each row's length, in place.

    The caller makes sure that `length + T ≤ S`: an update that sticks out would be
    moved, not cut.
    """
    cut = None if mesh is None else cut_axes(slots, rules, mesh)
    if mesh is None or cut is None:
        slots = jax.tree.map(functools.partial(_write, length=length), slots, new)
    else:
        entries = activation_spec(slots.shape, AXES, rules, mesh)
        of_slots = PartitionSpec(*entries[:3])  # of scales too, which have no H
        slots = jax.shard_map(
            functools.partial(_write_part, axes=cut),
            mesh=mesh,
            in_specs=(
                of_slots,
                PartitionSpec(entries[0], entries[1]),
                PartitionSpec(entries[0]),
            ),
            out_specs=of_slots,
            check_vma=False,
        )(slots, new, length)
    return pin_layout(slots, rules=rules, mesh=mesh)


def write_row(
    slots: SlotsT,
    new: SlotsT,
    row: Int[Array, ""],
    *,
    rules: Rules,
    mesh: Mesh | None,
) -> SlotsT:
    """Write one row's slots, `[1, K, S', H]` with S' ≤ S, from slot 0 on, in place."""
    if mesh is None:
        slots = jax.tree.map(functools.partial(_write_first, row=row), slots, new)
        return pin_layout(slots, rules=rules, mesh=mesh)
    rows, *rest = activation_spec(slots.shape, AXES, rules, mesh)
    of_slots = PartitionSpec(rows, *rest[:2])

    def on_device(slots: SlotsT, new: SlotsT, row: Array) -> SlotsT:
        if rows:
            row = row - jax.lax.axis_index(rows) * slots.shape[0]
        return jax.tree.map(functools.partial(_write_own, row=row), slots, new)

    new = pad_slots(new, slots.shape[2] - new.shape[2])
    slots = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_slots, PartitionSpec(None, *rest[:2]), PartitionSpec()),
        out_specs=of_slots,
        check_vma=False,
    )(slots, new, row)
    return pin_layout(slots, rules=rules, mesh=mesh)


def pin_layout(slots: SlotsT, *, rules: Rules, mesh: Mesh | None) -> SlotsT:
    """Slots in the layout that a cache has anyway.

    Otherwise the TPU compiler puts slots before heads inside a decoding loop: the cache
    is copied on the way in and out, and is in memory twice. The CPU compiler copies it
    on every step, to repeat the update inside its consumer.
    """
    return _each(constrain_layout, slots, rules, mesh)


def cut_axes(slots: Slots, rules: Rules, mesh: Mesh) -> str | MeshAxes | None:
    """The mesh axes that cut S, or None where every device has all slots."""
    names = activation_spec(slots.shape, AXES, rules, mesh)[2]
    return names if names and axes_size(mesh, names) > 1 else None


def first_slot(slots: Slots, axes: str | MeshAxes) -> Int[Array, ""]:
    """The index of the first slot of this device's part, inside `shard_map`."""
    return jax.lax.axis_index(axes) * slots.shape[2]


def _each(
    function: Callable[..., Array], slots: SlotsT, rules: Rules, mesh: Mesh | None
) -> SlotsT:
    """Apply a function of an array and its axis letters, to scales too."""
    letters = AXES.split()
    return jax.tree.map(
        lambda part: function(part, " ".join(letters[: part.ndim]), rules, mesh), slots
    )


def _write(
    slots: Shaped[Array, "B K S *H"],
    new: Shaped[Array, "B K T *H"],
    length: Int[Array, " B"],
) -> Array:
    # A loop over the rows, not a scatter: every compiler does a slice update at a
    # traced offset in place, also where the cache is donated or carried.
    for row in range(new.shape[0]):
        index = (row, 0, length[row], 0)[: slots.ndim]
        slots = jax.lax.dynamic_update_slice(slots, new[row : row + 1], index)
    return slots


def _write_first(
    slots: Shaped[Array, "B K S *H"],
    new: Shaped[Array, "1 K T *H"],
    row: Int[Array, ""],
) -> Array:
    return jax.lax.dynamic_update_slice(slots, new, (row, 0, 0, 0)[: slots.ndim])


def _write_own(
    slots: Shaped[Array, "B K S *H"],
    new: Shaped[Array, "1 K S *H"],
    row: Int[Array, ""],
) -> Array:
    """Write one row where this device has it; `row` may be out of its range."""
    is_own = (row >= 0) & (row < slots.shape[0])
    row = jnp.clip(row, 0, slots.shape[0] - 1)
    old = jax.lax.dynamic_index_in_dim(slots, row)
    return _write_first(slots, jnp.where(is_own, new, old), row)


def _write_part(
    slots: SlotsT, new: SlotsT, length: Int[Array, " B"], *, axes: str | MeshAxes
) -> SlotsT:
    """A device's slots, with those of the new tokens that fall among them."""
    offset = length - first_slot(slots, axes)
    return jax.tree.map(functools.partial(_write_inside, offset=offset), slots, new)


def _write_inside(
    slots: Shaped[Array, "B K S *H"],
    new: Shaped[Array, "B K T *H"],
    offset: Int[Array, " B"],
) -> Array:
    size, count = slots.shape[2], new.shape[2]
    if count > 1:
        index = jnp.arange(size)[None] - offset[:, None]
        index = index.reshape(-1, 1, size, *(1 for _ in slots.shape[3:]))
        values = jnp.take_along_axis(new, jnp.clip(index, 0, count - 1), axis=2)
        return jnp.where((index >= 0) & (index < count), values, slots)
    # One slot of each row is rewritten, with its old content where another device has
    # the new one: in place, which rewriting all slots would not be.
    for row in range(slots.shape[0]):
        at = (row, 0, jnp.clip(offset[row], 0, size - 1), 0)[: slots.ndim]
        shape = (1, slots.shape[1], 1, *slots.shape[3:])
        old = jax.lax.dynamic_slice(slots, at, shape)
        is_inside = (offset[row] >= 0) & (offset[row] < size)
        slots = jax.lax.dynamic_update_slice(
            slots, jnp.where(is_inside, new[row : row + 1], old), at
        )
    return slots
