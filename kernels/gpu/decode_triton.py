"""Attention of a few queries over a long cache, for NVIDIA GPUs: Pallas, by Triton.

    grid (splits, K · row blocks, B)

      a row's cache  ├── split 0 ──┼── split 1 ──┼── split 2 ──┤ behind: never read
                      one program    one program    one program
                           └───── partial outputs and logsumexps ─────┘
                                      │  a small sum, by XLA
                                    output

    registers     the queries of one key/value head, T · N / K of them (16 at least),
                  their sum of values, largest score and sum of weights, float32
    shared memory blocks of keys and values, fetched ahead by Triton
    HBM           the cache as it is, dense, in pages or in eight bits

One row of queries does little arithmetic, so that the bytes of the cache decide. They
are read once for all heads of a group, and by many programs at a time: every row's
valid slots are cut into as many parts, however long it is. Eight-bit numbers become
wider in registers; their scales are multiplied into scores and weights.

A dense cache is read as a paged one whose row b lies in page b.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.gpu.flash_triton import LEAST
from llama_jax.kernels.gpu.flash_triton_backward import (
    LOG2_E,
    product,
    row_spec,
    scores,
)
from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.reference import Pages, Slots

PROGRAMS = 264  # that there should be at least: two for each processor of an H100


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"],
    block_kv: int = 64,
    splits: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`kernels.attention` over a cache, reading each row's valid slots only.

    What a row gives depends on its own length alone, not on its neighbours', and two
    runs are equal bit for bit. Not differentiable.

    Args:
      q: queries, one or a few of each row.
      k: keys, or `QuantizedSlots`; cast to q's dtype in registers.
      v: values, likewise.
      q_start: slot of each row's first query.
      block_kv: slots of a step, a power of two ≥ 16.
      splits: parts that a row is cut into; chosen where not given.
      interpret: run by XLA, on any device.

    Raises:
      ValueError: shapes that do not fit each other, or a block that is no power of two.
    """
    own = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{q.shape[0]} rows of queries, {k.shape[0]} of keys")
    return _attend(q, k, v, own, q_start, block_kv, splits, interpret)


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int[Array, "B M"],
    *,
    q_start: Int[Array, " B"],
    block_kv: int = 64,
    splits: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`decode_attention` over pages, which are read where they lie.

    Args:
      q: queries, one or a few of each row.
      k_pages: pages of any number of slots, or `QuantizedSlots`.
      v_pages: likewise.
      page_table: slot s of a row is in page `page_table[row, s // C]`; entries behind
        a row's last slot are not looked at.
      q_start: slot of each row's first query.
      block_kv: slots of a step, from as many pages as they lie in.
      splits: as of `decode_attention`.
      interpret: likewise.

    Raises:
      ValueError: as `decode_attention`.
    """
    return _attend(
        q, k_pages, v_pages, page_table, q_start, block_kv, splits, interpret
    )


def _attend(
    q: Array,
    k: Pages,
    v: Pages,
    table: Array,
    q_start: Array,
    block_kv: int,
    splits: int | None,
    interpret: bool,
) -> Array:
    batch, queries, heads, width = q.shape
    groups, page, depth = k.shape[1:]
    if k.shape != v.shape or depth != width or heads % groups:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} do not fit queries {q.shape}"
        )
    if block_kv < 16 or block_kv & (block_kv - 1):
        raise ValueError(f"block_kv is {block_kv}; write a power of two, 16 or more")
    group, slots = heads // groups, table.shape[1] * page
    rows = queries * group  # of one key/value head
    block = min(64, max(16, pl.next_power_of_2(rows)))
    parts = pl.cdiv(rows, block)
    if splits is None:
        splits = pl.cdiv(PROGRAMS, batch * groups * parts)
        splits = max(1, min(splits, slots // (2 * block_kv)))
    wide = pl.next_power_of_2(width)
    grouped = q.reshape(batch, queries, groups, group, width).swapaxes(1, 2)
    grouped = grouped.reshape(batch, groups, rows, width)

    def place(s: Array, j: Array, b: Array) -> tuple[Array, ...]:
        return b, jax.lax.div(j, parts), s, jax.lax.rem(j, parts)

    def of_queries(s: Array, j: Array, b: Array) -> tuple[Any, ...]:
        return b, jax.lax.div(j, parts), jax.lax.rem(j, parts), 0

    cached = k, v
    partial, logsumexps = pl.pallas_call(
        functools.partial(
            _kernel,
            **{"queries": queries, "rows": rows, "slots": slots, "page": page},
            **{"block_kv": block_kv, "splits": splits, "parts": parts, "width": width},
        ),
        grid=(splits, groups * parts, batch),
        in_specs=[
            row_spec(q_start, row=lambda s, j, b: b),
            row_spec(table, table.shape[1], row=lambda s, j, b: b),
            pl.BlockSpec((None, None, block, wide), of_queries),
            *jax.tree.map(_all_of, cached),
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, block, wide), lambda *ids: (*place(*ids), 0)
            ),
            pl.BlockSpec((None, None, None, block), place),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, groups, splits, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, groups, splits, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(q_start, table, grouped, *cached)
    weights = jax.nn.softmax(logsumexps, axis=2)
    out = jnp.sum(partial * weights[..., None], axis=2).astype(q.dtype)
    out = out.reshape(batch, groups, queries, group, width).swapaxes(1, 2)
    return out.reshape(q.shape)


def _all_of(array: Array) -> pl.BlockSpec:
    """The whole array, of which only what is loaded is ever read."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _kernel(
    start_ref: Any,
    table_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    logsumexp_ref: Any,
    *,
    queries: int,
    rows: int,
    slots: int,
    page: int,
    block_kv: int,
    splits: int,
    parts: int,
    width: int,
) -> None:
    split = pl.program_id(0)
    head = jax.lax.div(pl.program_id(1), parts)
    block, wide = q_ref.shape
    row = jax.lax.rem(pl.program_id(1), parts) * block + jnp.arange(block)
    number = jnp.arange(wide)
    inside = (row < rows)[:, None] & (number < width)
    q = plgpu.load(q_ref, mask=inside, other=0)
    start = start_ref[()]
    query = start + row // (rows // queries)  # its slot
    limit = jnp.minimum(start + queries, slots)
    each = pl.cdiv(pl.cdiv(limit, block_kv), splits)

    def load(ref: Any, first: Array) -> tuple[Array, Array | None]:
        """A block of slots, zeros behind the row's last; its scales, if it has any."""
        slot = first + jnp.arange(block_kv)
        valid = slot < limit
        if table_ref.shape[0] == 1:
            pages, offset = jnp.broadcast_to(table_ref[0], slot.shape), slot
        else:
            pages = plgpu.load(table_ref.at[slot // page], mask=valid, other=0)
            offset = slot % page
        mask = valid[:, None] & (number < width)
        values = ref.values if isinstance(ref, QuantizedSlots) else ref
        at: Any = values.at[pages[:, None], head, offset[:, None], number[None, :]]
        numbers = plgpu.load(at, mask=mask, other=0).astype(q.dtype)
        if values is ref:
            return numbers, None
        scales = ref.scales.at[pages, head, offset]
        return numbers, plgpu.load(scales, mask=valid, other=0)

    def step(at: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        total, largest, weight = sums
        first = at * block_kv
        k, k_scale = load(k_ref, first)
        v, v_scale = load(v_ref, first)
        s = scores(q, k, width)
        if k_scale is not None:
            s *= k_scale[None, :]
        slot = first + jnp.arange(block_kv)
        s = jnp.where(slot[None, :] <= query[:, None], s, -jnp.inf)
        larger = jnp.maximum(largest, jnp.max(s, axis=1))
        shrink = jnp.exp2(largest - larger)
        p = jnp.exp2(s - larger[:, None])
        weight = weight * shrink + jnp.sum(p, axis=1)
        if v_scale is not None:
            p *= v_scale[None, :]
        total = total * shrink[:, None] + product(p.astype(q.dtype), v, (1, 0))
        return total, larger, weight

    sums: tuple[Array, ...] = (
        jnp.zeros((block, wide), jnp.float32),
        jnp.full((block,), LEAST, jnp.float32),
        jnp.zeros((block,), jnp.float32),
    )
    end = jnp.minimum((split + 1) * each, pl.cdiv(limit, block_kv))
    sums = jax.lax.fori_loop(split * each, end, step, sums)
    total, largest, weight = sums
    empty = weight == 0  # nothing in this part that the query sees
    weight = jnp.where(empty, 1, weight)
    plgpu.store(out_ref, total / weight[:, None], mask=inside)
    natural = jnp.where(empty, LEAST, (largest + jnp.log2(weight)) / LOG2_E)
    plgpu.store(logsumexp_ref, natural, mask=row < rows)
