"""The backward pass of `flash_triton`, and what both passes share.

Two kernels, each of which makes the weights P anew from q, k and the logsumexp:

    of queries, grid (T / block_q, N, B)      loops over the slots that they see
        registers      dq [block_q, H]; q, the gradient of the output, P, dS
    of slots,   grid (S / block_kv, K, B)     loops over the group's N / K heads and
        registers      dk, dv [block_kv, H]   the queries that see them; k, v, P, dS
    shared memory      the block that the loop is at
    HBM                all arrays as they are; Δ = Σ_H out · d(out), by XLA

Every sum is one program's, in one order: no atomic additions, and the same bits each
time. The heads of a group are summed in registers, so that dk and dv are never made
per query head.

Equations: Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike, Int

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Queries and slots of a block, and what Triton is told."""

    q: int
    kv: int
    warps: int
    stages: int


class Edges(NamedTuple):
    """Where the segments of packed rows let a loop over blocks begin or end."""

    first_kv: Int[Array, "B Q"]  # by block of queries, the first block of slots
    last_q: Int[Array, "B C"]  # by block of slots, one behind the last of queries


def edges(segment_ids: Array | None, tiles: Tiles) -> Edges | None:
    """Blocks outside of which nothing is of the same segment, for any numbering."""
    if segment_ids is None:
        return None
    first = jax.vmap(_first_of_segment)(segment_ids)
    last = segment_ids.shape[1] - jax.vmap(_first_of_segment)(segment_ids[:, ::-1])
    return Edges(
        first_kv=_by_block(first, tiles.q, jnp.min, segment_ids.shape[1]) // tiles.kv,
        last_q=pl.cdiv(_by_block(last[:, ::-1], tiles.kv, jnp.max, 0), tiles.q),
    )


def _first_of_segment(ids: Array) -> Array:
    """The index at which each element's number occurs first."""
    order = jnp.argsort(ids, stable=True)
    place = jnp.arange(ids.size)
    new = jnp.concatenate([jnp.array([True]), jnp.diff(ids[order]) != 0])
    start = jax.lax.cummax(jnp.where(new, place, 0))
    return jnp.zeros_like(place).at[order].set(order[start])


def _by_block(
    of_token: Array, size: int, reduce: Callable[..., Array], neutral: int
) -> Array:
    batch, length = of_token.shape
    pad = ((0, 0), (0, -length % size))
    padded = jnp.pad(of_token, pad, constant_values=neutral)
    return reduce(padded.reshape(batch, -1, size), axis=2).astype(jnp.int32)


def whole(size: int, block: int) -> int:
    """`size`, rounded up to blocks: what a reference must span to be cut into them."""
    return pl.cdiv(size, block) * block


def row_spec(
    array: Array | None, size: int | None = None, *, row: Callable[..., Any]
) -> pl.BlockSpec | None:
    """One row's number, or its first `size`; nothing of nothing."""
    if array is None:
        return None
    if size is None:
        return pl.BlockSpec((None,), lambda *ids: (row(*ids),))
    return pl.BlockSpec((None, size), lambda *ids: (row(*ids), 0))


def product(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Over one axis of each, summed in float32; float32 means float32, not TF32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def scores(q: Array, k: Array, width: int) -> Array:
    """In units of which `exp2` gives weights."""
    return product(q, k, (1, 1)) * (LOG2_E * width**-0.5)


def load_block(
    ref: Any,
    first: Array,
    size: int,
    limit: Array | int,
    numbers: Array,
    dtype: DTypeLike,
    *head: Array,
) -> Array:
    """Rows from `first` on; zeros from `limit` on, and behind a head's width."""
    row = first + jnp.arange(size)
    mask = (row < limit)[:, None] & numbers
    place = ref.at[(pl.ds(first, size), *head, slice(None))]
    return plgpu.load(place, mask=mask, other=0).astype(dtype)


def block_of(
    ref: Any, first: Array, size: int, limit: Array | int, *head: Array
) -> Array:
    """Numbers, one to a row; zeros from `limit` on."""
    row = first + jnp.arange(size)
    return plgpu.load(ref.at[(*head, pl.ds(first, size))], mask=row < limit, other=0)


def backward(
    tiles: Tiles,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
    out: Array,
    logsumexp: Array,
    given: Array,
) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v."""
    batch, queries, heads, width = q.shape
    groups, slots = k.shape[1:3]
    group = heads // groups
    wide = pl.next_power_of_2(width)
    delta = jnp.sum(out.astype(jnp.float32) * given.astype(jnp.float32), axis=-1)
    delta = delta.swapaxes(1, 2)  # B N T, as the logsumexp
    limits = edges(segment_ids, tiles)
    of_row = functools.partial(row_spec, row=lambda i, n, b: b)
    row_specs = [
        of_row(q_start),
        of_row(segment_ids, whole(queries, max(tiles.q, tiles.kv))),
        jax.tree.map(lambda edge: of_row(edge, edge.shape[1]), limits),
    ]
    call = functools.partial(
        pl.pallas_call,
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
    )
    sizes: dict[str, Any] = {"queries": queries, "slots": slots, "width": width}
    operands = (q_start, segment_ids, limits, q, k, v, given, logsumexp, delta)

    blocks = pl.cdiv(queries, tiles.q)
    queries_spec = pl.BlockSpec(
        (None, tiles.q, None, wide), lambda i, n, b: (b, blocks - 1 - i, n, 0)
    )
    slots_spec = pl.BlockSpec(
        (None, None, whole(slots, tiles.kv), wide),
        lambda i, n, b: (b, jax.lax.div(n, group), 0, 0),
    )
    numbers_spec = pl.BlockSpec(
        (None, None, tiles.q), lambda i, n, b: (b, n, blocks - 1 - i)
    )
    of_q = call(
        functools.partial(_queries_kernel, tiles=tiles, **sizes),
        grid=(blocks, heads, batch),
        in_specs=[
            *row_specs,
            *(queries_spec, slots_spec, slots_spec, queries_spec),
            *(numbers_spec, numbers_spec),
        ],
        out_specs=queries_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="flash_attention_gradient_of_queries",
    )(*operands)

    all_rows = whole(queries, tiles.q)
    group_spec = pl.BlockSpec(
        (None, all_rows, group, wide), lambda i, g, b: (b, 0, g, 0)
    )
    numbers_spec = pl.BlockSpec((None, group, all_rows), lambda i, g, b: (b, g, 0))
    slots_spec = pl.BlockSpec(
        (None, None, tiles.kv, wide), lambda i, g, b: (b, g, i, 0)
    )
    of_k, of_v = call(
        functools.partial(_slots_kernel, tiles=tiles, **sizes),
        grid=(pl.cdiv(slots, tiles.kv), groups, batch),
        in_specs=[
            *row_specs,
            *(group_spec, slots_spec, slots_spec, group_spec),
            *(numbers_spec, numbers_spec),
        ],
        out_specs=[slots_spec, slots_spec],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="flash_attention_gradient_of_slots",
    )(*operands)
    return of_q, of_k, of_v


def _queries_kernel(
    start_ref: Any,
    ids_ref: Any,
    edge_refs: Edges | None,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    given_ref: Any,
    logsumexp_ref: Any,
    delta_ref: Any,
    of_q_ref: Any,
    *,
    tiles: Tiles,
    queries: int,
    slots: int,
    width: int,
) -> None:
    block = pl.num_programs(0) - 1 - pl.program_id(0)
    wide = q_ref.shape[-1]
    row = block * tiles.q + jnp.arange(tiles.q)
    numbers = jnp.arange(wide) < width
    inside = (row < queries)[:, None] & numbers
    q = plgpu.load(q_ref, mask=inside, other=0)
    given = plgpu.load(given_ref, mask=inside, other=0).astype(q.dtype)
    logsumexp = plgpu.load(logsumexp_ref, mask=row < queries, other=0) * LOG2_E
    delta = plgpu.load(delta_ref, mask=row < queries, other=0)
    start = 0 if start_ref is None else start_ref[()]
    last = jnp.minimum((block + 1) * tiles.q, queries) + start
    limit = jnp.minimum(start + queries, slots)
    ids: Any = None
    if ids_ref is not None:
        ids = block_of(ids_ref, block * tiles.q, tiles.q, queries)

    def step(masked: bool, at: Array, of_q: Array) -> Array:
        first = at * tiles.kv
        k = load_block(k_ref, first, tiles.kv, limit, numbers, q.dtype)
        v = load_block(v_ref, first, tiles.kv, limit, numbers, q.dtype)
        s = scores(q, k, width)
        if masked:
            slot = first + jnp.arange(tiles.kv)
            mask = slot[None, :] <= (start + row)[:, None]
            if ids_ref is not None:
                of_slots = block_of(ids_ref, first, tiles.kv, queries)
                mask &= ids[:, None] == of_slots[None, :]
            s = jnp.where(mask, s, -jnp.inf)
        p = jnp.exp2(s - logsumexp[:, None])
        of_s = p * (product(given, v, (1, 1)) - delta[:, None])
        return of_q + product(of_s.astype(q.dtype), k, (1, 0))

    of_q = jnp.zeros((tiles.q, wide), jnp.float32)
    end = pl.cdiv(jnp.minimum(last, slots), tiles.kv)
    if edge_refs is None:
        full = jnp.minimum((start + block * tiles.q + 1) // tiles.kv, end)
        of_q = jax.lax.fori_loop(0, full, functools.partial(step, False), of_q)
    else:
        full = edge_refs.first_kv[block]
    of_q = jax.lax.fori_loop(full, end, functools.partial(step, True), of_q)
    plgpu.store(of_q_ref, (of_q * width**-0.5).astype(of_q_ref.dtype), mask=inside)


def _slots_kernel(
    start_ref: Any,
    ids_ref: Any,
    edge_refs: Edges | None,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    given_ref: Any,
    logsumexp_ref: Any,
    delta_ref: Any,
    of_k_ref: Any,
    of_v_ref: Any,
    *,
    tiles: Tiles,
    queries: int,
    slots: int,
    width: int,
) -> None:
    block = pl.program_id(0)
    group, wide = q_ref.shape[-2:]
    dtype = q_ref.dtype
    slot = block * tiles.kv + jnp.arange(tiles.kv)
    numbers = jnp.arange(wide) < width
    start = 0 if start_ref is None else start_ref[()]
    limit = jnp.minimum(start + queries, slots)
    seen = (slot < limit)[:, None] & numbers
    k = plgpu.load(k_ref, mask=seen, other=0).astype(dtype)
    v = plgpu.load(v_ref, mask=seen, other=0).astype(dtype)
    ids: Any = None
    if ids_ref is not None:
        ids = block_of(ids_ref, block * tiles.kv, tiles.kv, queries)

    def step(
        masked: bool, head: Array, at: Array, sums: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        of_k, of_v = sums
        first = at * tiles.q
        rows = first, tiles.q, queries
        q = load_block(q_ref, *rows, numbers, dtype, head)
        given = load_block(given_ref, *rows, numbers, dtype, head)
        logsumexp = block_of(logsumexp_ref, *rows, head) * LOG2_E
        delta = block_of(delta_ref, *rows, head)
        s = scores(q, k, width)
        if masked:
            row = first + jnp.arange(tiles.q)
            mask = slot[None, :] <= (start + row)[:, None]
            if ids_ref is not None:
                of_rows = block_of(ids_ref, first, tiles.q, queries)
                mask &= of_rows[:, None] == ids[None, :]
            s = jnp.where(mask, s, -jnp.inf)
        # Behind the last query q, its gradient and Δ are zeros, and add nothing.
        p = jnp.exp2(s - logsumexp[:, None])
        of_v += product(p.astype(dtype), given, (0, 0))
        of_s = p * (product(given, v, (1, 1)) - delta[:, None])
        return of_k + product(of_s.astype(dtype), q, (0, 0)), of_v

    end: Any = pl.cdiv(queries, tiles.q)
    first = jnp.maximum(block * tiles.kv - start, 0) // tiles.q
    if edge_refs is None:
        # From here on every query sees the whole block.
        full = jnp.maximum((block + 1) * tiles.kv - 1 - start, 0)
        full = jnp.minimum(pl.cdiv(full, tiles.q), end)
    else:
        full = end = edge_refs.last_q[block]

    def of_head(head: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        masked = functools.partial(step, True, head)
        sums = jax.lax.fori_loop(first, full, masked, sums)
        if edge_refs is None:
            unmasked = functools.partial(step, False, head)
            sums = jax.lax.fori_loop(jnp.maximum(first, full), end, unmasked, sums)
        return sums

    zeros = jnp.zeros((tiles.kv, wide), jnp.float32)
    of_k, of_v = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
    inside = (slot < slots)[:, None] & numbers
    of_k *= width**-0.5
    plgpu.store(of_k_ref, of_k.astype(of_k_ref.dtype), mask=inside)
    plgpu.store(of_v_ref, of_v.astype(of_v_ref.dtype), mask=inside)
