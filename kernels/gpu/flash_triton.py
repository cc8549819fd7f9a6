"""Flash attention for NVIDIA GPUs from Ampere on: Pallas, lowered to Triton.

    grid (T / block_q, N, B): one program makes one block of one head's queries

           slots →   block_kv
        ┌────────┬────────┬────────┬────────┐
      q │  full  │  full  │ masked │  ────  │   blocks behind the last query are
        └────────┴────────┴────────┴────────┘   never read; only those that cross
                                                the diagonal are masked
    registers     a block of queries, its sum of values [block_q, H], the largest
                  score and the sum of weights of each query, all float32
    shared memory a block of keys and one of values, fetched ahead by Triton
    HBM           q, k, v as they are; the output and each query's logsumexp

Head n reads the keys of head n // (N / K) where they lie: nothing is repeated. Triton
wants powers of two, so that 80 and 96 numbers of a head become 128 by masked loads, and
so does the last block of queries or slots; no array is padded. Packed rows begin at the
first block in which one of their segments begins. Programs with the most blocks start
first.

Tiles are chosen from shared memory and registers on paper; no device has timed them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.gpu import flash_triton_backward
from llama_jax.kernels.gpu.flash_triton_backward import (
    LOG2_E,
    Edges,
    Tiles,
    block_of,
    edges,
    load_block,
    product,
    row_spec,
    scores,
    whole,
)

LEAST = -1e30  # as large as no score is negative, and finite: no NaN by subtraction


class Blocks(NamedTuple):
    """How much of the queries and slots one program holds, forward and backward."""

    forward: Tiles
    backward: Tiles


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`kernels.attention` for a GPU, without scores in memory, differentiable.

    The backward pass computes the weights again from the logsumexp of each query; it
    adds in one order, so that two runs are equal bit for bit. Slots behind the last
    query of a row are not read, whatever they hold.

    Args:
      q: queries.
      k: keys; cast to q's dtype block by block.
      v: values, likewise.
      q_start: slot of each row's first query; 0 where not given.
      segment_ids: for packed rows (S = T); any numbers, a segment need not be in one
        piece.
      block_q: queries of a program, a power of two ≥ 16; chosen where not given.
      block_kv: slots of a step, likewise.
      interpret: run by XLA, on any device.

    Raises:
      ValueError: shapes that do not fit each other, heads wider than 256, or blocks
        that are no power of two.
    """
    check(q, k, v, segment_ids)
    blocks = _blocks(q, k.shape[2], block_q, block_kv)
    return _attend(blocks, interpret, q, k, v, q_start, segment_ids)


def attention_and_logsumexp(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """`flash_attention`, not differentiable, and the logsumexp of each query's scores.

    Raises:
      ValueError: as `flash_attention`.
    """
    check(q, k, v, segment_ids)
    tiles = _blocks(q, k.shape[2], None, None).forward
    return _forward(tiles, interpret, q, k, v, q_start, segment_ids)


def gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    out: Float[Array, "B T N H"],
    logsumexp: Float[Array, "B N T"],
    given: Float[Array, "B T N H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Gradients of q, k and v from what any forward pass has kept.

    Args:
      q: queries, as the keys and values those of the forward pass.
      k: keys.
      v: values.
      out: what attention gave.
      logsumexp: of each query's scores, natural.
      given: gradient of `out`.
      q_start: as of `flash_attention`.
      segment_ids: likewise.
      interpret: likewise.
    """
    tiles = _blocks(q, k.shape[2], None, None).backward
    return flash_triton_backward.backward(
        tiles, interpret, q, k, v, q_start, segment_ids, out, logsumexp, given
    )


def check(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    """Refuse shapes that fit no flash attention, ours or Hopper's."""
    batch, queries, heads, width = q.shape
    groups, slots = k.shape[1:3]
    if k.shape != (batch, groups, slots, width) or v.shape != k.shape:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} do not fit queries {q.shape}"
        )
    if heads % groups:
        raise ValueError(f"{heads} query heads are no multiple of {groups} of keys")
    if width > 256:
        raise ValueError(f"head_dim is {width}; the kernel holds at most 256")
    if segment_ids is not None and slots != queries:
        raise ValueError(
            f"packed rows attend to themselves, but there are {slots} slots for "
            f"{queries} queries; leave segment_ids out with a cache"
        )


def _blocks(q: Array, slots: int, block_q: int | None, block_kv: int | None) -> Blocks:
    """Those asked for, or what fits 99 kB of shared memory with one block ahead."""
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size is not None and (size < 16 or size & (size - 1)):
            raise ValueError(f"{name} is {size}; write a power of two, 16 or more")
    wide = pl.next_power_of_2(q.shape[3]) > 64
    small = (1 + (q.dtype == jnp.float32)) * (1 + (q.shape[3] > 128))
    whole_q, whole_kv = (
        max(16, pl.next_power_of_2(size)) for size in (q.shape[1], slots)
    )

    def tiles(rows: int, columns: int, warps: int) -> Tiles:
        return Tiles(
            q=block_q or min(whole_q, rows // small),
            kv=block_kv or min(whole_kv, columns // small),
            warps=warps,
            stages=2,
        )

    return Blocks(tiles(128, 64, 8 if wide else 4), tiles(64, 64, 8 if wide else 4))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    blocks: Blocks,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> Array:
    return _forward(blocks.forward, interpret, q, k, v, q_start, segment_ids)[0]


_Kept = tuple[Array, Array, Array, Array | None, Array | None, Array, Array]


def _attend_forward(
    blocks: Blocks,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, _Kept]:
    out, logsumexp = _forward(blocks.forward, interpret, q, k, v, q_start, segment_ids)
    return out, (q, k, v, q_start, segment_ids, out, logsumexp)


def _attend_backward(
    blocks: Blocks, interpret: bool, kept: _Kept, given: Array
) -> tuple[Array, Array, Array, None, None]:
    gradient = flash_triton_backward.backward(blocks.backward, interpret, *kept, given)
    return *gradient, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    tiles: Tiles,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    batch, queries, heads, width = q.shape
    slots, group = k.shape[2], heads // k.shape[1]
    blocks = pl.cdiv(queries, tiles.q)
    wide = pl.next_power_of_2(width)

    def of_queries(i: Array, n: Array, b: Array) -> tuple[Array, Array, Array, int]:
        return b, blocks - 1 - i, n, 0

    queries_spec = pl.BlockSpec((None, tiles.q, None, wide), of_queries)
    slots_spec = pl.BlockSpec(
        (None, None, whole(slots, tiles.kv), wide),
        lambda i, n, b: (b, jax.lax.div(n, group), 0, 0),
    )
    of_row = functools.partial(row_spec, row=lambda i, n, b: b)
    limits = edges(segment_ids, tiles)
    kernel = functools.partial(_kernel, tiles=tiles, queries=queries, slots=slots)
    kernel = functools.partial(kernel, width=width)
    out, logsumexp = pl.pallas_call(
        kernel,
        grid=(blocks, heads, batch),
        in_specs=[
            of_row(q_start),
            of_row(segment_ids, whole(queries, max(tiles.q, tiles.kv))),
            jax.tree.map(lambda edge: of_row(edge, edge.shape[1]), limits),
            queries_spec,
            slots_spec,
            slots_spec,
        ],
        out_specs=[
            queries_spec,
            pl.BlockSpec((None, None, tiles.q), lambda i, n, b: (b, n, blocks - 1 - i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
        name="flash_attention",
    )(q_start, segment_ids, limits, q, k, v)
    return out, logsumexp


def _kernel(
    start_ref: Any,
    ids_ref: Any,
    edge_refs: Edges | None,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    logsumexp_ref: Any,
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
    start = 0 if start_ref is None else start_ref[()]
    last = jnp.minimum((block + 1) * tiles.q, queries) + start  # one behind, of block
    limit = jnp.minimum(start + queries, slots)  # one behind the row's last
    ids: Any = None
    if ids_ref is not None:
        ids = block_of(ids_ref, block * tiles.q, tiles.q, queries)

    def step(masked: bool, at: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        total, largest, weight = sums
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
        larger = jnp.maximum(largest, jnp.max(s, axis=1))
        shrink = jnp.exp2(largest - larger)
        p = jnp.exp2(s - larger[:, None])
        total = total * shrink[:, None] + product(p.astype(q.dtype), v, (1, 0))
        return total, larger, weight * shrink + jnp.sum(p, axis=1)

    sums: tuple[Array, ...] = (
        jnp.zeros((tiles.q, wide), jnp.float32),
        jnp.full((tiles.q,), LEAST, jnp.float32),
        jnp.zeros((tiles.q,), jnp.float32),
    )
    end = pl.cdiv(jnp.minimum(last, slots), tiles.kv)
    if edge_refs is None:
        # Blocks that the block's first query sees all of need no mask.
        full = jnp.minimum((start + block * tiles.q + 1) // tiles.kv, end)
        sums = jax.lax.fori_loop(0, full, functools.partial(step, False), sums)
    else:
        full = edge_refs.first_kv[block]
    sums = jax.lax.fori_loop(full, end, functools.partial(step, True), sums)
    total, largest, weight = sums
    out = (total / weight[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref, out, mask=inside)
    natural = (largest + jnp.log2(weight)) / LOG2_E
    plgpu.store(logsumexp_ref, natural, mask=row < queries)
