"""The forward pass of flash attention for TPUs (arXiv:2205.14135).

For one row of the batch and one query head; scores exist one tile at a time, in VMEM:

               k, v: S slots, a block of `tiles.kv` at a time
             ┌───────┬───────┬───────┬───────┐
      q:     │ whole │ mixed │   ·   │   ·   │     whole: every query sees every slot;
    T rows,  ├───────┼───────┼───────┼───────┤       one large body without a mask
    a block  │ whole │ whole │ mixed │   ·   │     mixed: cut into strips of `STRIP`
    of       ├───────┼───────┼───────┼───────┤       rows, each of them whole, masked
    tiles.q  │ whole │ whole │ whole │ mixed │       or skipped
             └───────┴───────┴───────┴───────┘     ·: neither computed nor read

The grid visits a list of the windows that any row could need, one row of tiles after
another; a step covers the tiles of one window, `tiles.window` slots. Memory:

* HBM: q, k, v and the output; the pipeline copies windows ahead of their use. A
  key/value head is read once per query head of its group, never repeated in memory.
* VMEM: for the current row of tiles, the running maximum and sum of the softmax
  (`[tiles.q, 128]`; the sum still per lane), and the unnormalized output
  (`[tiles.q, H]` float32).
* SMEM: the list of windows, each row's `q_start`, and the smallest and largest segment
  of every block, from which the kind of a tile follows without reading it.
* registers: one tile's scores and weights. Scores are in units of log 2, the base of
  the hardware's exponential.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from llama_jax.kernels.compat import reciprocal
from llama_jax.kernels.precision import product
from llama_jax.kernels.refs import Ref, Scalar
from llama_jax.kernels.tpu.flash_tiles import (
    LANES,
    LOG2_E,
    MASKED,
    Block,
    Tiles,
    across,
    grid_step,
    is_last_of_block,
    lane_sums,
    segment_operands,
    tile_list,
    walk,
    wide,
    window_read,
)


def inverse(x: Array) -> Array:
    """1 / x of normal numbers, in fewer operations than a division."""
    y = reciprocal(x, approx=True)
    y = y * (2 - x * y)
    return y * (2 - x * y)


def _forward_kernel(
    *arguments: Ref, tiles: Tiles, scale: float, slots: int, packed: bool, lse: bool
) -> None:
    refs: Sequence[Ref]
    scalars, refs = arguments[:3], arguments[3:]
    bounds = refs[: 2 * packed]
    q_ref, k_ref, v_ref, *refs = refs[2 * packed :]
    q_ids, kv_ids = refs[:2] if packed else (None, None)
    o_ref, *lse_ref, m_ref, l_ref, acc_ref = refs[2 * packed :]
    step, steps = pl.program_id(2), pl.num_programs(2)
    grid = grid_step(scalars, bounds, step, tiles, slots)

    def attend(at: Scalar, size: int, at_kv: Scalar, masked: bool) -> None:
        """Add a block of slots to the softmax of some queries."""
        rows, block = pl.ds(at, size), pl.ds(at_kv, tiles.kv)
        v = v_ref[0, 0, block]
        scores = product(q_ref[0, 0, rows], k_ref[0, 0, block], 1, 1)
        scores = scores * (scale * LOG2_E)
        if masked:
            q_slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            kv_slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            first = grid.first_kv + at_kv
            seen = kv_slot - q_slot <= grid.first_q + at - first
            if q_ids is not None and kv_ids is not None:
                seen &= across(q_ids[0, :, rows]) == kv_ids[0, :, block]
            if slots % tiles.window:
                # After the last slot the block holds stale data.
                seen &= kv_slot < slots - first
                slot = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
                v = jnp.where(slot < slots - first, v, jnp.zeros_like(v))
            scores = jnp.where(seen, scores, MASKED)
        before = m_ref[rows]
        m = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        decay = jnp.exp2(before - m)
        weights = jnp.exp2(scores - wide(m, tiles.kv))
        m_ref[rows] = m
        l_ref[rows] = l_ref[rows] * decay + lane_sums(weights)
        update = product(weights.astype(v.dtype), v, 1, 0)
        acc_ref[rows] = acc_ref[rows] * wide(decay, update.shape[1]) + update

    def begin() -> None:
        m_ref[...] = jnp.full_like(m_ref, MASKED)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    pl.when(step == 0)(begin)
    walk(tiles, grid, attend)

    @pl.when(is_last_of_block(scalars[1], step, steps))
    def finish() -> None:
        m = m_ref[...]
        total = jnp.sum(l_ref[...], axis=1, keepdims=True)
        total = jnp.broadcast_to(total, m.shape)
        some = m > MASKED / 2  # else the query attends to nothing
        norm = jnp.where(some, inverse(total), 0.0)
        o_ref[0, 0] = (acc_ref[...] * wide(norm, acc_ref.shape[1])).astype(o_ref.dtype)
        if lse:
            natural = jnp.where(some, (m + jnp.log2(total)) / LOG2_E, -jnp.inf)
            lse_ref[0][0, 0] = natural.T[:1]
        begin()  # for the next block of queries


def flash_forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_start: Int[Array, " B"] | None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    *,
    tiles: Tiles,
    with_lse: bool = True,
    out_dtype: DTypeLike | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"] | None]:
    """Compute attention, and log Σ exp(scores) of every query.

    Args:
      q: queries.
      k: keys.
      v: values.
      q_start: slot of each row's first query; may be negative. Defaults to 0.
      segment_ids: segments of queries and of slots.
      tiles: tile sizes.
      with_lse: whether to return log Σ exp(scores).
      out_dtype: dtype of the output; defaults to that of `q`.
      interpret: run in interpret mode, on any device.

    Returns:
      The output (0 where a query attends to nothing), and log Σ exp(scores) (-inf
      there) or None.
    """
    batch, heads, queries, width = q.shape
    kv_heads, slots = k.shape[1:3]
    tiles = tiles.within(queries, slots)
    group = heads // kv_heads
    q_of, kv_of = tile_list(queries, slots, tiles, causal=q_start is None)
    start = jnp.zeros((batch,), jnp.int32) if q_start is None else q_start

    def q_block(b: Array, n: Array, step: Array, *scalars: Ref) -> Block:
        return b, n, scalars[1][step], 0

    def row_block(b: Array, n: Array, step: Array, *scalars: Ref) -> Block:
        return b, n, 0, scalars[1][step]

    window = functools.partial(window_read, tiles, slots)

    def kv_block(b: Array, n: Array, step: Array, *scalars: Ref) -> Block:
        return b, jax.lax.div(n, jnp.int32(group)), window(b, step, *scalars), 0

    scalars = [start.astype(jnp.int32), q_of, kv_of]
    q_spec = pl.BlockSpec((1, 1, tiles.q, width), q_block)
    kv_spec = pl.BlockSpec((1, 1, tiles.window, width), kv_block)
    bounds, ids, id_specs = segment_operands(segment_ids, tiles, q_block, kv_block)
    outs = [jax.ShapeDtypeStruct(q.shape, out_dtype or q.dtype)]
    out_specs = [q_spec]
    if with_lse:
        outs.append(jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, 1, tiles.q), row_block))
    out, *lse = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            tiles=tiles,
            scale=width**-0.5,
            slots=slots,
            packed=segment_ids is not None,
            lse=with_lse,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + len(bounds),
            grid=(batch, heads, len(q_of)),
            in_specs=[q_spec, kv_spec, kv_spec, *id_specs],
            out_specs=out_specs,
            scratch_shapes=[
                pltpu.VMEM((tiles.q, LANES), jnp.float32),
                pltpu.VMEM((tiles.q, LANES), jnp.float32),
                pltpu.VMEM((tiles.q, width), jnp.float32),
            ],
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
        ),
        name="flash_forward",
        interpret=interpret,
    )(*scalars, *bounds, q, k, v, *ids)
    return out, lse[0][:, :, 0] if lse else None
