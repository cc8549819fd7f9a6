"""Flash attention for TPUs: scores exist a tile at a time, in VMEM.

The forward pass, for one row of the batch and one query head (arXiv:2205.14135):

               k, v: S slots, a block of `tiles.kv` at a time
             ┌───────┬───────┬───────┬───────┐
      q:     │ whole │ mixed │   ·   │   ·   │     whole: every query sees every slot;
    T rows,  ├───────┼───────┼───────┼───────┤       one large body without a mask
    a block  │ whole │ whole │ mixed │   ·   │     mixed: taken apart in strips of
    of       ├───────┼───────┼───────┼───────┤       `STRIP` rows, each of them whole,
    tiles.q  │ whole │ whole │ whole │ mixed │       masked or left out
             └───────┴───────┴───────┴───────┘     ·: neither computed nor read

The grid walks a list of what any row could need, row of tiles by row of tiles; a step
of it takes the tiles of one window, `tiles.window` slots. Where things are:

* HBM: q, k, v and the output; windows come and go by copies of the pipeline, ahead of
  their use. A key/value head is read for each query head of its group, never repeated.
* VMEM: of the row of tiles at hand, the running maximum and the sum of the softmax
  (`[tiles.q, 128]`; the sum still apart by lane), and the output before its division
  (`[tiles.q, H]` float32).
* SMEM: the list of windows, each row's `q_start`, and the smallest and largest segment
  of every block, which decide without looking at a tile what kind it is.
* registers: what the compiler makes of a tile. Scores are in units of log 2, since the
  hardware's exponential has that base.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from llama_jax.kernels.compat import reciprocal
from llama_jax.kernels.tpu.flash_tiles import (
    LANES,
    LOG2_E,
    MASKED,
    Tiles,
    across,
    is_last_of_block,
    place_of,
    product,
    segments_of,
    tile_list,
    walk,
    window_read,
)


def wide(column: Float[Array, "T 128"], width: int) -> Float[Array, "T width"]:
    """A column, held in every lane, over another number of lanes."""
    if width <= LANES:
        return column[:, :width]
    whole = jnp.concatenate([column] * (width // LANES), axis=1)
    rest = width % LANES
    return jnp.concatenate([whole, column[:, :rest]], axis=1) if rest else whole


def by_lane(x: Float[Array, "T S"]) -> Float[Array, "T 128"]:
    """Sums over S, apart by lane: the lanes are added up once, at the end."""
    if x.shape[1] % LANES:
        total = jnp.sum(x, axis=1, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
        return jnp.where(lane == 0, total, 0.0)
    parts = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)


def inverse(x: Array) -> Array:
    """1 / x of normal numbers, in fewer operations than a division."""
    y = reciprocal(x, approx=True)
    y = y * (2 - x * y)
    return y * (2 - x * y)


def _forward_kernel(
    *arguments: Any, tiles: Tiles, scale: float, slots: int, packed: bool, lse: bool
) -> None:
    refs: Any
    scalars, refs = arguments[:3], arguments[3:]
    bounds = refs[: 2 * packed]
    q_ref, k_ref, v_ref, *refs = refs[2 * packed :]
    q_ids, kv_ids = refs[:2] if packed else (None, None)
    o_ref, *lse_ref, m_ref, l_ref, acc_ref = refs[2 * packed :]
    step, steps = pl.program_id(2), pl.num_programs(2)
    place = place_of(scalars, bounds, step, tiles, slots)

    def attend(at: Any, size: int, at_kv: Any, masked: bool) -> None:
        """Fold the scores of some queries and a block of slots into the sums."""
        rows, block = pl.ds(at, size), pl.ds(at_kv, tiles.kv)
        v = v_ref[0, 0, block]
        scores = product(q_ref[0, 0, rows], k_ref[0, 0, block], 1, 1)
        scores = scores * (scale * LOG2_E)
        if masked:
            q_slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            kv_slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            first = place.first_kv + at_kv
            seen = kv_slot - q_slot <= place.first_q + at - first
            if q_ids is not None and kv_ids is not None:
                seen &= across(q_ids[0, :, rows]) == kv_ids[0, :, block]
            if slots % tiles.window:
                # Behind the last slot lies whatever lay there before.
                seen &= kv_slot < slots - first
                slot = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
                v = jnp.where(slot < slots - first, v, jnp.zeros_like(v))
            scores = jnp.where(seen, scores, MASKED)
        before = m_ref[rows]
        m = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        kept = jnp.exp2(before - m)
        weights = jnp.exp2(scores - wide(m, tiles.kv))
        m_ref[rows] = m
        l_ref[rows] = l_ref[rows] * kept + by_lane(weights)
        mixed = product(weights.astype(v.dtype), v, 1, 0)
        acc_ref[rows] = acc_ref[rows] * wide(kept, mixed.shape[1]) + mixed

    def begin() -> None:
        m_ref[...] = jnp.full_like(m_ref, MASKED)
        l_ref[...] = jnp.zeros_like(l_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    pl.when(step == 0)(begin)
    walk(tiles, place, attend)

    @pl.when(is_last_of_block(scalars[1], step, steps))
    def finish() -> None:
        m = m_ref[...]
        total = jnp.sum(l_ref[...], axis=1, keepdims=True)
        total = jnp.broadcast_to(total, m.shape)
        some = m > MASKED / 2  # else the query saw nothing
        norm = jnp.where(some, inverse(total), 0.0)
        o_ref[0, 0] = (acc_ref[...] * wide(norm, acc_ref.shape[1])).astype(o_ref.dtype)
        if lse:
            found = jnp.where(some, (m + jnp.log2(total)) / LOG2_E, -jnp.inf)
            lse_ref[0][0, 0] = found.T[:1]
        begin()  # for the next block of queries, while this one's is computed


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
    interpret: Any = False,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"] | None]:
    """Attention, and log Σ exp(scores) of every query (-inf where it sees nothing)."""
    batch, heads, queries, width = q.shape
    kv_heads, slots = k.shape[1:3]
    tiles = tiles.within(queries, slots)
    group = heads // kv_heads
    q_of, kv_of = tile_list(queries, slots, tiles, causal=q_start is None)
    start = jnp.zeros((batch,), jnp.int32) if q_start is None else q_start

    def q_block(b: Any, n: Any, step: Any, start: Any, q_of: Any, *_: Any) -> Any:
        return b, n, q_of[step], 0

    def row_block(b: Any, n: Any, step: Any, start: Any, q_of: Any, *_: Any) -> Any:
        return b, n, 0, q_of[step]

    window = functools.partial(window_read, tiles, slots)

    def kv_block(b: Any, n: Any, step: Any, *scalars: Any) -> Any:
        return b, jax.lax.div(n, jnp.int32(group)), window(b, step, *scalars), 0

    scalars = [start.astype(jnp.int32), q_of, kv_of]
    arrays = [q, k, v]
    q_spec = pl.BlockSpec((1, 1, tiles.q, width), q_block)
    kv_spec = pl.BlockSpec((1, 1, tiles.window, width), kv_block)
    specs = [q_spec, kv_spec, kv_spec]
    if segment_ids is not None:
        ids = segments_of(segment_ids[0], segment_ids[1], tiles)
        scalars += [ids.q_bounds, ids.kv_bounds]
        arrays += [ids.q, ids.kv]
        specs += [
            pl.BlockSpec(
                (1, 1, tiles.q), lambda b, n, s, _, q_of, *__: (b, 0, q_of[s])
            ),
            pl.BlockSpec(
                (1, 1, tiles.window), lambda b, n, s, *r: (b, 0, window(b, s, *r))
            ),
        ]
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
            num_scalar_prefetch=len(scalars),
            grid=(batch, heads, len(q_of)),
            in_specs=specs,
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
    )(*scalars, *arrays)
    return out, lse[0][:, :, 0] if lse else None
