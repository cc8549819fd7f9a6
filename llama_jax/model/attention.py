"""Attention on a mesh: each device computes its rows and its heads.

XLA partitions array operations, but not a kernel: it would gather its operands on every
device. So they are cut here: along B and N, whose parts are independent; along T, whose
parts pass their keys around (`kernels.ring`); and along the slots of a cache, where the
results of the parts are joined.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax.sharding import PartitionSpec

from llama_jax import kernels
from llama_jax.errors import ConfigError
from llama_jax.kernels import ring
from llama_jax.kernels.logsumexp import AxisName, weight_over_axis
from llama_jax.kernels.partial_attention import passes_of
from llama_jax.kernels.quantized_slots import (
    QuantizedSlots,
    dequantize_slots,
    zero_later_slots,
)
from llama_jax.kernels.reference import Pages, Slots
from llama_jax.kernels.selection import is_decoding
from llama_jax.model.pages import gather
from llama_jax.model.slots import AXES as SLOTS
from llama_jax.model.slots import cut_axes, first_slot
from llama_jax.runtime import Rules, Runtime
from llama_jax.sharding import activation_spec, axes_size
from llama_jax.types import Array, Float, Int, Mesh, PyTree

Name = Literal["xla", "mosaic_tpu"]


def attend(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B T"] | None,
    runtime: Runtime,
    mesh: Mesh | None,
) -> Float[Array, "B T N H"]:
    """Compute `kernels.attention` by the runtime's choice, on a mesh if there is one.

    Args:
      q: queries of all tokens, in `ring_order` if that is not None.
      k: keys of the same tokens, or of a cache's slots, in eight bits too.
      v: values, likewise.
      q_start: the slot of each row's first query in a cache; None without a cache.
      segment_ids: of packed rows.
      runtime: its implementation and rules count.
      mesh: the devices.

    Raises:
      ConfigError: the runtime's implementation cannot be cut along T or the slots.
    """
    name = kernels.resolve(runtime.attention, q, k, q_start=q_start)
    run = functools.partial(kernels.attention, implementation=name)
    if mesh is None or mesh.size == 1:
        return run(q, k, v, q_start=q_start, segment_ids=segment_ids)
    if q_start is None and ring_order(q.shape[1], runtime.rules, mesh) is not None:
        parts = _of_parts(name, runtime)
        return _around_the_ring(q, k, v, segment_ids, parts, runtime.rules, mesh)
    if q_start is not None and cut_axes(k, runtime.rules, mesh):
        parts = _of_parts(name, runtime)
        if isinstance(k, QuantizedSlots) and runtime.attention == "auto":
            parts = "xla"  # widens within its products, the kernel's pass before it
        return _over_cut_slots(q, k, v, q_start, parts, runtime.rules, mesh)
    if name == "xla" and not isinstance(k, QuantizedSlots):
        return run(q, k, v, q_start=q_start, segment_ids=segment_ids)
    rows, _, heads, _ = activation_spec(q.shape, "B T N H", runtime.rules, mesh)
    kv_heads = activation_spec(k.shape, "B K T H", runtime.rules, mesh)[1]
    heads, own_heads = _shared_heads(q, k, heads, kv_heads, mesh)

    def on_device(
        q: Array, k: Slots, v: Slots, rest: tuple[Array | None, ...]
    ) -> Array:
        return run(q, own_heads(k), own_heads(v), q_start=rest[0], segment_ids=rest[1])

    of_queries = PartitionSpec(rows, None, heads)
    of_slots = PartitionSpec(rows, kv_heads)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_queries, of_slots, of_slots, PartitionSpec(rows)),
        out_specs=of_queries,
        check_vma=False,
    )(q, k, v, (q_start, segment_ids))


def attend_pages(
    q: Float[Array, "B T N H"],
    k: Pages,
    v: Pages,
    page_table: Int[Array, "B M"],
    *,
    q_start: Int[Array, " B"],
    runtime: Runtime,
) -> Float[Array, "B T N H"]:
    """`kernels.paged_attention` by the runtime's choice, on one device.

    Many queries (a chunk of a prompt) attend to a dense copy of their rows' pages: the
    products then take longer than the copy, and kernels for few queries do not apply.

    Args:
      q: of the tokens just appended.
      k: pages of keys.
      v: of values.
      page_table: the page of every C slots of a row; each entry must be a page.
      q_start: the slot of each row's first query.
      runtime: its implementation of attention counts.
    """
    name = runtime.attention
    if is_decoding(q.shape[1], q.shape[2] // k.shape[1]):
        return kernels.paged_attention(
            q, k, v, page_table, q_start=q_start, implementation=name
        )
    k, v = gather(k, page_table), gather(v, page_table)
    v = zero_later_slots(v, q_start + q.shape[1])
    return kernels.attention(q, k, v, q_start=q_start, implementation=name)


def ring_order(length: int, rules: Rules, mesh: Mesh | None) -> np.ndarray | None:
    """The order of the tokens of a row on a mesh, for attention without a cache.

    None if no mesh axis cuts T, or not into the ring's two chunks per device: then
    tokens are in the order of the sequence.
    """
    axes = dict(rules.activations).get("T") or ()
    devices = 1 if mesh is None else axes_size(mesh, axes)
    if devices == 1 or length % (2 * devices):
        return None
    return ring.zigzag_order(length, devices)


def in_order(x: Array, axes: str, rules: Rules, mesh: Mesh | None) -> Array:
    """Reorder an array from `ring_order` to the order of the sequence.

    Args:
      x: has an entry for each token.
      axes: its letters, T among them.
      rules: map axis letters to mesh axes.
      mesh: the devices.
    """
    along = axes.split().index("T")
    if mesh is None or ring_order(x.shape[along], rules, mesh) is None:
        return x
    spec = activation_spec(x.shape, axes, rules, mesh)
    return jax.shard_map(
        functools.partial(ring.in_order, axis_name=spec[along], axis=along),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )(x)


def _of_parts(name: str, runtime: Runtime) -> Name:
    """The implementation for attention over parts, whose results are joined."""
    if name == "mosaic_tpu":
        return "mosaic_tpu"
    if name != "xla" and runtime.attention != "auto":
        raise ConfigError(
            f"runtime: attention={runtime.attention!r} cannot join the results of "
            "devices that have parts of a sequence; choose 'xla', 'mosaic_tpu' or "
            "'auto'"
        )
    return "xla"


def _around_the_ring(
    q: Array,
    k: Slots,
    v: Slots,
    ids: Array | None,
    name: Name,
    rules: Rules,
    mesh: Mesh,
) -> Array:
    rows, tokens, heads, _ = activation_spec(q.shape, "B T N H", rules, mesh)
    kv_heads = activation_spec(k.shape, "B K T H", rules, mesh)[1]
    heads, own_heads = _shared_heads(q, k, heads, kv_heads, mesh)

    def on_device(q: Array, k: Array, v: Array, ids: Array | None) -> Array:
        return ring.ring_attention(
            q,
            own_heads(k),
            own_heads(v),
            axis_name=tokens,
            segment_ids=ids,
            implementation=name,
        )

    of_queries = PartitionSpec(rows, tokens, heads)
    of_keys = PartitionSpec(rows, kv_heads, tokens)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_queries, of_keys, of_keys, PartitionSpec(rows, tokens)),
        out_specs=of_queries,
        check_vma=False,
    )(q, k, v, ids)


def _over_cut_slots(
    q: Array, k: Slots, v: Slots, q_start: Array, name: Name, rules: Rules, mesh: Mesh
) -> Array:
    """Each device attends to its slots, and the results are joined.

    Queries are gathered if `tensor` cuts the slots, and the results cut along N again.
    """
    rows, kv_heads, cut, _ = activation_spec(k.shape, SLOTS, rules, mesh)
    heads = activation_spec(q.shape, "B T N H", rules, mesh)[2]
    # N is cut here by the axes that cut K, if any.
    heads = heads if kv_heads else None
    scatter = None
    of_heads = dict(rules.activations).get("N") or ()
    cut_by = (cut,) if isinstance(cut, str) else tuple(cut)
    if heads is None and set(of_heads) <= set(cut_by):
        ways = axes_size(mesh, of_heads)
        scatter = of_heads if ways > 1 and q.shape[2] % ways == 0 else None
    passes = passes_of(name)

    def on_device(q: Array, k: Slots, v: Slots, start: Array) -> Array:
        start = start - first_slot(k, cut)
        wide = (dequantize_slots(slots, q.dtype) for slots in (k, v))
        out, lse = passes.forward(q.swapaxes(1, 2), *wide, start, None)
        out = out * weight_over_axis(lse, cut)[..., None]
        if scatter:
            out = jax.lax.psum_scatter(out, scatter, scatter_dimension=1, tiled=True)
            rest = tuple(axis for axis in cut_by if axis not in scatter)
            out = jax.lax.psum(out, rest) if rest else out
        else:
            out = jax.lax.psum(out, cut)
        return out.swapaxes(1, 2).astype(q.dtype)

    of_slots = PartitionSpec(rows, kv_heads, cut)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(
            PartitionSpec(rows, None, heads),
            of_slots,
            of_slots,
            PartitionSpec(rows),
        ),
        out_specs=PartitionSpec(rows, None, heads or scatter),
        check_vma=False,
    )(q, k, v, q_start)


def _shared_heads(
    q: Array, k: Slots, heads: AxisName | None, kv_heads: AxisName | None, mesh: Mesh
) -> tuple[AxisName | None, Callable[[Slots], PyTree]]:
    """The mesh axes of N, and a function that takes a device's key/value heads.

    With fewer key/value heads than parts of N, every device has all and takes one.
    """
    if heads is None or kv_heads is not None:
        return heads, lambda x: x
    parts, count = axes_size(mesh, heads), k.shape[1]
    if parts % count or q.shape[2] % parts:
        return None, lambda x: x

    def take(x: Slots) -> PyTree:
        head = jax.lax.axis_index(heads) * count // parts
        return jax.tree.map(
            lambda part: jax.lax.dynamic_slice_in_dim(part, head, 1, 1), x
        )

    return heads, take
