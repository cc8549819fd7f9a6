"""Attention of a few queries over a long cache, for NVIDIA GPUs: Pallas, by Triton.

    grid (splits, K · row blocks, B)

      a row's cache  ├── split 0 ──┼── split 1 ──┼── split 2 ──┤ after: never read
                      one program    one program    one program
                           └──── partial outputs and log-sum-exps ────┘
                                      │  a small sum, by XLA
                                    output

    registers     the T · N / K queries (at least 16) of one key/value head, and their
                  weighted sum of values, largest score and sum of weights, float32
    shared memory blocks of keys and values, prefetched by Triton
    HBM           the cache in place: dense or paged, floating point or int8

A few queries do little arithmetic, so decoding is bound by reading the cache. It is
read once for all heads of a group, and by many programs at once: the valid slots of
every row are cut into the same number of splits, whatever their length. Int8 values are
widened in registers; their scales are multiplied into scores and weights.

A dense cache is a paged one whose row b is page b.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.gpu.triton_tiles import (
    LEAST,
    LOG2_E,
    OnlineSoftmax,
    row_spec,
    scores,
)
from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.reference import Pages, Slots
from llama_jax.kernels.refs import Ref, Scalar

MIN_PROGRAMS = 264  # two per multiprocessor of an H100


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
    """Compute `kernels.attention` over a cache, reading only the valid slots of a row.

    Deterministic; the output of a row does not depend on other rows. Not
    differentiable.

    Args:
      q: queries, one or a few per row.
      k: keys, floating point or int8; cast to q's dtype in registers.
      v: values, like `k`.
      q_start: slot of each row's first query.
      block_kv: slots of a step, a power of two ≥ 16.
      splits: programs that share a row; has a default.
      interpret: run in interpret mode, on any device.

    Raises:
      ValueError: shapes that do not match, or a block that is no power of two.
    """
    row_as_page = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    if q.shape[0] != k.shape[0]:
        raise ValueError(
            f"queries and keys must have the same number of rows, got {q.shape[0]} "
            f"and {k.shape[0]}"
        )
    return _attend(q, k, v, row_as_page, q_start, block_kv, splits, interpret)


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
    """Compute `kernels.paged_attention`, reading pages in place.

    Args:
      q: queries, one or a few per row.
      k_pages: pages of keys, of any number of slots, floating point or int8.
      v_pages: pages of values, like `k_pages`.
      page_table: slot s of a row is in page `page_table[row, s // C]`; entries after a
        row's last slot are not used.
      q_start: slot of each row's first query.
      block_kv: slots of a step, which may span pages.
      splits: see `decode_attention`.
      interpret: run in interpret mode, on any device.

    Raises:
      ValueError: see `decode_attention`.
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
            f"keys {k.shape} and values {v.shape} do not match queries {q.shape}"
        )
    if block_kv < 16 or block_kv & (block_kv - 1):
        raise ValueError(
            f"block_kv must be a power of two, at least 16, got {block_kv}"
        )
    group, slots = heads // groups, table.shape[1] * page
    rows = queries * group  # of one key/value head
    block = min(64, max(16, pl.next_power_of_2(rows)))
    parts = pl.cdiv(rows, block)
    if splits is None:
        splits = pl.cdiv(MIN_PROGRAMS, batch * groups * parts)
        splits = max(1, min(splits, slots // (2 * block_kv)))
    wide = pl.next_power_of_2(width)
    grouped = q.reshape(batch, queries, groups, group, width).swapaxes(1, 2)
    grouped = grouped.reshape(batch, groups, rows, width)

    def out_index(s: Array, j: Array, b: Array) -> tuple[Array, ...]:
        return b, jax.lax.div(j, parts), s, jax.lax.rem(j, parts)

    def q_index(s: Array, j: Array, b: Array) -> tuple[Scalar, ...]:
        return b, jax.lax.div(j, parts), jax.lax.rem(j, parts), 0

    kernel = functools.partial(
        _kernel,
        queries=queries, rows=rows, slots=slots, page=page,
        block_kv=block_kv, splits=splits, parts=parts, width=width,
    )  # fmt: skip
    cached = k, v
    partial, lse = pl.pallas_call(
        kernel,
        grid=(splits, groups * parts, batch),
        in_specs=[
            row_spec(q_start, row=lambda s, j, b: b),
            row_spec(table, table.shape[1], row=lambda s, j, b: b),
            pl.BlockSpec((None, None, block, wide), q_index),
            *jax.tree.map(_all_of, cached),
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, None, block, wide), lambda *ids: (*out_index(*ids), 0)
            ),
            pl.BlockSpec((None, None, None, block), out_index),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((batch, groups, splits, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, groups, splits, rows), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_attention",
    )(q_start, table, grouped, *cached)
    weights = jax.nn.softmax(lse, axis=2)
    out = jnp.sum(partial * weights[..., None], axis=2).astype(q.dtype)
    out = out.reshape(batch, groups, queries, group, width).swapaxes(1, 2)
    return out.reshape(q.shape)


def _all_of(array: Array) -> pl.BlockSpec:
    """The whole array in HBM; only loaded parts of it are read."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def _kernel(
    start_ref: Ref,
    table_ref: Ref,
    q_ref: Ref,
    k_ref: Ref | QuantizedSlots,
    v_ref: Ref | QuantizedSlots,
    out_ref: Ref,
    lse_ref: Ref,
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
    column = jnp.arange(wide)[None]
    inside = (row < rows)[:, None] & (column < width)
    q = plgpu.load(q_ref, mask=inside, other=0)
    start = start_ref[()]
    query_slot = start + row // (rows // queries)
    limit = jnp.minimum(start + queries, slots)
    steps = pl.cdiv(pl.cdiv(limit, block_kv), splits)

    def load(ref: Ref | QuantizedSlots, first: Array) -> tuple[Array, Array | None]:
        """A block of slots, zeros after the row's last; and scales of int8 slots."""
        slot = first + jnp.arange(block_kv)
        valid = slot < limit
        if table_ref.shape[0] == 1:
            pages, offset = jnp.broadcast_to(table_ref[0], slot.shape), slot
        else:
            pages = plgpu.load(table_ref.at[slot // page], mask=valid, other=0)
            offset = slot % page
        mask = valid[:, None] & (column < width)
        values, scales = ref if isinstance(ref, QuantizedSlots) else (ref, None)
        at = values.at[pages[:, None], head, offset[:, None], column]
        loaded = plgpu.load(at, mask=mask, other=0).astype(q.dtype)
        if scales is None:
            return loaded, None
        scale = plgpu.load(scales.at[pages, head, offset], mask=valid, other=0)
        return loaded, scale

    def step(at: Array, softmax: OnlineSoftmax) -> OnlineSoftmax:
        first = at * block_kv
        k, k_scale = load(k_ref, first)
        v, v_scale = load(v_ref, first)
        s = scores(q, k, width)
        if k_scale is not None:
            s *= k_scale[None, :]
        slot = first + jnp.arange(block_kv)
        s = jnp.where(slot[None, :] <= query_slot[:, None], s, -jnp.inf)
        return softmax.add(s, v, v_scale)

    end = jnp.minimum((split + 1) * steps, pl.cdiv(limit, block_kv))
    softmax = OnlineSoftmax.empty(block, wide)
    softmax = jax.lax.fori_loop(split * steps, end, step, softmax)
    empty = softmax.weight == 0  # the query sees nothing of this split
    weight = jnp.where(empty, 1, softmax.weight)
    plgpu.store(out_ref, softmax.total / weight[:, None], mask=inside)
    natural = jnp.where(empty, LEAST, (softmax.largest + jnp.log2(weight)) / LOG2_E)
    plgpu.store(lse_ref, natural, mask=row < rows)
