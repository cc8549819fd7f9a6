"""Attention on a mesh: each device computes its rows and its heads.

XLA cuts array operations up by itself, but not a kernel: it would gather the operands
of one on every device. So the cut is made here, along B and N, whose parts need nothing
of each other.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from llama_jax import kernels
from llama_jax.runtime import Runtime
from llama_jax.sharding import axes_size, divisible
from llama_jax.types import Array, Float, Int, Mesh


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B T"] | None,
    runtime: Runtime,
    mesh: Mesh | None,
) -> Float[Array, "B T N H"]:
    """`kernels.attention` by the runtime's choice, on a mesh where there is one."""
    name = kernels.resolve(runtime.attention, q, k, q_start=q_start)
    if mesh is None or mesh.size == 1 or name == "xla":
        return kernels.attention(
            q, k, v, q_start=q_start, segment_ids=segment_ids, implementation=name
        )
    rows, _, heads, _ = divisible(q, "B T N H", runtime.rules, mesh)
    kv_heads = divisible(k, "B K S H", runtime.rules, mesh)[1]
    shared = heads is not None and kv_heads is None
    if shared and not _within_groups(q.shape[2], k.shape[1], axes_size(mesh, heads)):
        heads, shared = None, False

    def on_device(q: Array, k: Array, v: Array, rest: Any) -> Array:
        if shared:  # fewer key/value heads than parts: each takes the one it needs
            part = jax.lax.axis_index(heads)
            mine = part * k.shape[1] // axes_size(mesh, heads)
            k, v = (jax.lax.dynamic_slice_in_dim(x, mine, 1, 1) for x in (k, v))
        return kernels.attention(
            q, k, v, q_start=rest[0], segment_ids=rest[1], implementation=name
        )

    of_queries = PartitionSpec(rows, None, heads)
    of_slots = PartitionSpec(rows, kv_heads)
    run = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(of_queries, of_slots, of_slots, PartitionSpec(rows)),
        out_specs=of_queries,
        check_vma=False,
    )
    out: Array = run(q, k, v, (q_start, segment_ids))
    return out


def _within_groups(heads: int, kv_heads: int, parts: int) -> bool:
    """Whether the query heads of every part share one key/value head."""
    return parts % kv_heads == 0 and heads % parts == 0
