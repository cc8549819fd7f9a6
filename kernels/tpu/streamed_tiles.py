"""A block of slots in a TPU's VMEM: its tiling, and the softmax over it.

Keys and values have to be loaded into the matrix units however few queries there are,
so they are the stationary operand, and the few rows of queries stream by:

    scores [rows, block]   = q [rows, H] . keys of a head, transposed
    weights [rows, block]  = exp(scores - m)                   m: largest so far
    sum [rows, H]         += weights [rows, block] . values of a head

    registers   scores and weights of several heads at once
    VMEM        keys and values [heads, block, H]; m, l [rows, 128] and the sum
                [rows, H] of each tile of rows: the softmax so far, in float32

A register of scores holds 8 rows. Key/value heads with fewer queries (one, if T and G
are 1) share a register:

    rows of a tile   | head 0 | head 1 | .. | head 7 |       T . G rows each
    times keys of head 0, of head 1, ..: a row keeps the product with its own head

The other products are discarded, but the softmax of 8 heads then costs as much as that
of one.

XLA lays out arrays with the least padding: H in the lanes if it fills them, else the
slots, if they do. Kernels need the last axis in the lanes, so in the second case they
take `[.., H, S]`, which is the same bytes, and read no padding either.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from llama_jax.kernels.precision import product
from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.refs import Ref
from llama_jax.kernels.selection import MAX_DECODE_ROWS
from llama_jax.kernels.tpu.flash_tiles import LANES, lane_sums, wide

_SUBLANES = 8
_BLOCK_BYTES = 2**20  # of keys, and as many of values
_SCORES = 64  # registers of scores in flight at a time

Slice: TypeAlias = slice | pl.Slice
"""The type of `pl.ds`."""


class Tiling(NamedTuple):
    """Tile sizes.

    Attributes:
      queries: T.
      group: query heads per key/value head, G.
      heads: key/value heads of a block.
      pack: number of heads that share a score tile.
      rows: rows of a score tile, a multiple of 8; `pack · T · G` are used.
      block: slots of a block.
      slots_last: whether the slots are in the lanes, not H.
    """

    queries: int
    group: int
    heads: int
    pack: int
    rows: int
    block: int
    slots_last: bool

    @property
    def score_tiles(self) -> int:
        """Score tiles of a block."""
        return self.heads // self.pack


class Seen(NamedTuple):
    """The slots of a block that queries attend to.

    Attributes:
      first: first slot of the block.
      fresh: number of slots that the block before had too.
      valid: number of slots up to the row's last query; may exceed the block.
    """

    first: Array
    fresh: Array
    valid: Array


class Softmax(NamedTuple):
    """The softmax over the blocks so far, in VMEM.

    Attributes:
      m: largest score, `[tiles, rows, 128]`, the same in every lane.
      l: sum of the weights, `[tiles, rows, 128]`, spread over the lanes.
      sums: sum of the weighted values, `[tiles, rows, H]`.
      last: last slot that each row attends to, `[rows, 128]`.
    """

    m: Ref
    l: Ref  # noqa: E741
    sums: Ref
    last: Ref


def tiling(
    q: Float[Array, "B T N H"],
    k: Float[Array, "_ K _ H"] | QuantizedSlots,
    block: Callable[[int], int],
    cores: int,
) -> Tiling:
    """Choose the tiling for these shapes.

    Args:
      q: queries.
      k: keys of a dense or paged cache.
      block: function from the slots that make a megabyte to the slots of a block.
      cores: number of cores that share the heads.

    Raises:
      ValueError: shapes or dtypes that the kernel does not support.
    """
    quantized = isinstance(k, QuantizedSlots)
    bytes_each = (k.values if isinstance(k, QuantizedSlots) else k).dtype.itemsize
    _, queries, num_heads, width = q.shape
    _, num_kv_heads, slots, _ = k.shape
    group = num_heads // num_kv_heads
    used = queries * group
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"queries must be bfloat16 or float32, got {q.dtype}")
    if used > MAX_DECODE_ROWS:
        raise ValueError(
            f"{queries} queries of {group} heads are {used} rows per key/value head; "
            f"the decoding kernel supports {MAX_DECODE_ROWS}"
        )
    if slots % _SUBLANES:
        raise ValueError(
            f"the number of slots must be a multiple of {_SUBLANES}, got {slots}"
        )
    slots_last = _padded(slots, width) < _padded(width, slots)
    if (slots_last or quantized) and slots % LANES:
        raise ValueError(
            f"the number of slots must be a multiple of {LANES} if they are int8 or "
            f"head_dim is no multiple of {LANES}, got {slots}"
        )
    slot_bytes = bytes_each * (width if slots_last else _up(width, LANES))
    heads = next(
        count
        for count in range(num_kv_heads // math.gcd(cores, num_kv_heads), 0, -1)
        if num_kv_heads % count == 0
        and (count == 1 or count * slot_bytes * LANES <= _BLOCK_BYTES)
    )
    pack = max(
        count
        for count in range(1, heads + 1)
        if heads % count == 0 and (count == 1 or count * used <= _SUBLANES)
    )
    return Tiling(
        queries=queries,
        group=group,
        heads=heads,
        pack=pack,
        rows=_up(pack * used, _SUBLANES),
        block=block(max(LANES, _BLOCK_BYTES // (heads * slot_bytes))),
        slots_last=slots_last,
    )


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _padded(lanes: int, sublanes: int) -> int:
    return _up(lanes, LANES) * _up(sublanes, _SUBLANES)


def slots_at(ref: Ref, tiles: Tiling, slots: Slice, *front: object) -> Ref:
    """Slots of an array `[.., S, H]` or `[.., H, S]`, or of scales `[.., S]`.

    Args:
      ref: the array.
      tiles: tells whether the slots are last.
      slots: slice of slots.
      front: indices of the axes before.
    """
    if len(ref.shape) == len(front) + 2 and tiles.slots_last:
        return ref.at[*front, :, slots]
    return ref.at[*front, slots]


def begin(tiles: Tiling, softmax: Softmax, q_start: Array) -> None:
    """Initialize the softmax of a row whose first query is at slot `q_start`."""
    softmax.m[...] = jnp.full_like(softmax.m, -jnp.inf)
    softmax.l[...] = jnp.zeros_like(softmax.l)
    softmax.sums[...] = jnp.zeros_like(softmax.sums)
    row = jax.lax.broadcasted_iota(jnp.int32, softmax.last.shape, 0)
    query = jnp.zeros_like(row)
    if tiles.queries > 1:
        for n in range(1, tiles.pack * tiles.queries):
            query = jnp.where(row >= n * tiles.group, n % tiles.queries, query)
    softmax.last[...] = q_start + query


def attend(
    tiles: Tiling,
    q_ref: Ref,
    k: Ref | QuantizedSlots,
    v: Ref | QuantizedSlots,
    softmax: Softmax,
    seen: Seen,
) -> None:
    """Add a block to the softmax.

    Args:
      tiles: tile sizes.
      q_ref: the row's queries, `[1, tiles, rows, H]`.
      k: keys of the block, `[heads, block, H]`, `[heads, H, block]` or quantized.
      v: values of the block, like `k`.
      softmax: softmax over the blocks before; updated in place.
      seen: which slots of the block are attended to.
    """
    k_ref, k_scales = k if isinstance(k, QuantizedSlots) else (k, None)
    v_ref, v_scales = v if isinstance(v, QuantizedSlots) else (v, None)
    dtype, width = q_ref.dtype, q_ref.shape[-1]
    used = tiles.queries * tiles.group
    tile = (tiles.rows, tiles.block)
    row = jax.lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0)
    slot = jax.lax.broadcasted_iota(jnp.int32, tile, 1)
    visible = slot <= wide(softmax.last[...] - seen.first, tiles.block)
    visible &= slot >= seen.fresh

    def select_by_row(per_head: Sequence[Array]) -> Array:
        """For each row the array of its own head."""
        selected = per_head[0]
        for n in range(1, tiles.pack):
            selected = jnp.where(row >= n * used, per_head[n], selected)
        return selected

    def heads_of(n: int) -> range:
        return range(n * tiles.pack, (n + 1) * tiles.pack)

    def times(rows: Array, ref: Ref | Array, n: int, axis: int) -> Array:
        """Rows of score tile n times their heads of `ref`, contracting `axis`."""
        axis ^= tiles.slots_last
        return select_by_row(
            [product(rows, ref[head].astype(dtype), 1, axis) for head in heads_of(n)]
        )

    def factors(ref: Ref | Array, n: int) -> Array:
        return select_by_row(
            [jnp.broadcast_to(ref[head][None], tile) for head in heads_of(n)]
        )

    # Products, softmax and products again, each for several heads at once: they are
    # independent, which hides the latency of the MXU.
    chunk = max(1, _SCORES * _SUBLANES * LANES // (tiles.rows * tiles.block))
    for first in range(0, tiles.score_tiles, chunk):
        those = range(first, min(first + chunk, tiles.score_tiles))
        scores = [times(q_ref[0, n], k_ref, n, 1) * width**-0.5 for n in those]
        weights, alphas = [], []
        for n, raw in zip(those, scores, strict=True):
            if k_scales is not None:
                raw *= factors(k_scales, n)
            score = jnp.where(visible, raw, -jnp.inf)
            before = softmax.m[n]
            now = jnp.maximum(before, jnp.max(score, axis=-1, keepdims=True))
            weight = jnp.exp(score - wide(now, tiles.block))
            alpha = jnp.exp(before - now)
            softmax.m[n] = now
            softmax.l[n] = alpha * softmax.l[n] + lane_sums(weight)
            if v_scales is not None:
                scaled = weight * factors(v_scales, n)
                weight = jnp.where(slot < seen.valid, scaled, 0.0)
            weights.append(weight.astype(dtype))
            alphas.append(alpha)
        for n, weight, alpha in zip(those, weights, alphas, strict=True):
            new = times(weight, v_ref, n, 0)
            softmax.sums[n] = softmax.sums[n] * wide(alpha, width) + new


def finish(softmax: Softmax, out_ref: Ref) -> None:
    """Write the output of a row after its last block."""
    for n in range(softmax.sums.shape[0]):
        total = jnp.sum(softmax.l[n], axis=-1, keepdims=True)
        out_ref[0, n] = (softmax.sums[n] / total).astype(out_ref.dtype)


def clear(tiles: Tiling, values: Ref, valid: Array) -> None:
    """Write zeros after the valid slots of a block, where values may be NaN."""
    axis = 2 if tiles.slots_last else 1
    step = math.gcd(tiles.block, LANES if tiles.slots_last else 32)

    def one(n: Array, _: None) -> None:
        first = pl.multiple_of(n * step, step)
        at = (slice(None),) * axis + (pl.ds(first, step),)
        piece = values[at]
        slot = first + jax.lax.broadcasted_iota(jnp.int32, piece.shape, axis)
        values[at] = jnp.where(slot < valid, piece, jnp.zeros_like(piece))

    begin = jax.lax.div(valid, jnp.int32(step))
    jax.lax.fori_loop(begin, tiles.block // step, one, None)
