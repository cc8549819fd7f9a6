"""A block of slots in a TPU's VMEM: how it is cut, and how queries take it in.

The slots' share of the arithmetic is the same however few queries there are, so keys
and values are the operand that stays in the matrix units, and few rows pass by:

    scores [rows, block]   = q [rows, H] . keys of a head, transposed
    weights [rows, block]  = exp(scores - m)                   m: largest so far
    sum [rows, H]         += weights [rows, block] . values of a head

    registers   scores and weights of several heads at once
    VMEM        keys and values [heads, block, H]; m, l [rows, 128] and the sum
                [rows, H] of each tile of rows: the softmax so far, in float32

A register of scores holds 8 rows. A key/value head with fewer queries (one, if T and G
are 1) shares them with as many other heads as fit:

    rows of a tile   | head 0 | head 1 | .. | head 7 |       T . G rows each
    times keys of head 0, of head 1, ..: a row keeps what its own head gave

The products of the other rows are thrown away, but the softmax of 8 heads then costs
what that of one would.

XLA lays arrays out with the least padding: H in the lanes where it fills them, else
the slots, if they do. Kernels want the last axis in the lanes, so in the second case
they take `[.., H, S]`, which is the same bytes, and read no padding either.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.reference import precision_of

LANES = 128
_SUBLANES = 8
_BLOCK_BYTES = 2**20  # of keys, and as many of values
_MOST_ROWS = 128
_SCORES = 64  # registers of them that are in flight at a time


class Tiling(NamedTuple):
    """How the work is cut.

    Attributes:
      queries: T.
      group: query heads to a key/value head, G.
      heads: key/value heads of a block.
      pack: how many of them share the rows of a score tile.
      rows: of a score tile, a multiple of 8; `pack · T · G` are used.
      block: slots of a block.
      slots_last: the slots are in the lanes, not H.
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
    """Which slots of a block are looked at.

    Attributes:
      first: the slot that the block begins with.
      fresh: how many of its first were in the block before as well.
      valid: how many are not behind the row's last query; may be more than there are.
    """

    first: Any
    fresh: Any
    valid: Any


class Softmax(NamedTuple):
    """What the blocks so far came to, in VMEM.

    Attributes:
      m: the largest score, `[tiles, rows, 128]`, in every lane the same.
      l: the sum of the weights, `[tiles, rows, 128]`, spread over the lanes.
      sums: of the weighted values, `[tiles, rows, H]`.
      last: the last slot that each row sees, `[rows, 128]`.
    """

    m: Any
    l: Any  # noqa: E741
    sums: Any
    last: Any


def tiling(
    q: Float[Array, "B T N H"],
    k: Float[Array, "_ K _ H"] | QuantizedSlots,
    block: Callable[[int], int],
    cores: int,
) -> Tiling:
    """The tiling for these shapes.

    Args:
      q: queries.
      k: the cache or pages.
      block: from the slots that make a megabyte to those that a block shall have.
      cores: among how many the heads are to be divided.

    Raises:
      ValueError: shapes or types that the kernel has no tiling for.
    """
    quantized = isinstance(k, QuantizedSlots)
    bytes_each = (k.values if isinstance(k, QuantizedSlots) else k).dtype.itemsize
    _, queries, num_heads, width = q.shape
    _, num_kv_heads, slots, _ = k.shape
    group = num_heads // num_kv_heads
    used = queries * group
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"queries are {q.dtype}; TPUs multiply bfloat16 and float32")
    if used > _MOST_ROWS:
        raise ValueError(
            f"{queries} queries of {group} heads each make {used} rows to a key/value "
            f"head; the decoding kernel holds {_MOST_ROWS}"
        )
    if slots % _SUBLANES:
        raise ValueError(f"{slots} slots are no multiple of {_SUBLANES}")
    slots_last = _padded(slots, width) < _padded(width, slots)
    if (slots_last or quantized) and slots % LANES:
        raise ValueError(
            f"{slots} slots are no multiple of {LANES}, which they must be where they "
            "are in eight bits or head_dim is no multiple of 128"
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


def slots_at(ref: Any, tiles: Tiling, slots: Any, *front: Any) -> Any:
    """Slots of an array `[.., S, H]`, `[.., H, S]` or, of scales, `[.., S]`.

    Args:
      ref: behind the axes that `front` indexes.
      tiles: whether the slots are last.
      slots: their slice.
      front: index of heads, and what else comes first.
    """
    if len(ref.shape) == len(front) + 2 and tiles.slots_last:
        return ref.at[*front, :, slots]
    return ref.at[*front, slots]


def begin(tiles: Tiling, softmax: Softmax, q_start: Any) -> None:
    """No block yet, of a row whose first query is at slot `q_start`."""
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
    tiles: Tiling, q_ref: Any, k: Any, v: Any, softmax: Softmax, seen: Seen
) -> None:
    """Take in a block.

    Args:
      tiles: how it is cut.
      q_ref: the row's queries, `[1, tiles, rows, H]`.
      k: its keys, `[heads, block, H]` or `[heads, H, block]`, or `QuantizedSlots`.
      v: its values, likewise.
      softmax: of the blocks before, and then of this one too.
      seen: which of its slots are looked at.
    """
    k_ref, k_scales = k if isinstance(k, QuantizedSlots) else (k, None)
    v_ref, v_scales = v if isinstance(v, QuantizedSlots) else (v, None)
    dtype, width = q_ref.dtype, q_ref.shape[-1]
    used = tiles.queries * tiles.group
    tile = (tiles.rows, tiles.block)
    row = jax.lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0)
    slot = jax.lax.broadcasted_iota(jnp.int32, tile, 1)
    visible = slot <= _wide(softmax.last[...] - seen.first, tiles.block)
    visible &= slot >= seen.fresh

    def own(pieces: Sequence[Any]) -> Any:
        """Of each row its own head's piece."""
        chosen = pieces[0]
        for n in range(1, tiles.pack):
            chosen = jnp.where(row >= n * used, pieces[n], chosen)
        return chosen

    def product(rows: Any, ref: Any, n: int, axis: int) -> Any:
        """Rows times those heads of `ref` that share them, contracting `axis`."""

        def times(head: int) -> Any:
            return jax.lax.dot_general(
                rows,
                ref[head].astype(dtype),
                (((1,), (axis ^ tiles.slots_last,)), ((), ())),
                precision=precision_of(dtype),
                preferred_element_type=jnp.float32,
            )

        return own([times(n * tiles.pack + head) for head in range(tiles.pack)])

    def factors(ref: Any, n: int) -> Any:
        heads = range(n * tiles.pack, (n + 1) * tiles.pack)
        return own([jnp.broadcast_to(ref[head][None], tile) for head in heads])

    # Products, softmax and products again each for several heads at once: they do not
    # depend on each other, and the MXU answers late.
    chunk = max(1, _SCORES * _SUBLANES * LANES // (tiles.rows * tiles.block))
    for first in range(0, tiles.score_tiles, chunk):
        those = range(first, min(first + chunk, tiles.score_tiles))
        scores = [product(q_ref[0, n], k_ref, n, 1) * width**-0.5 for n in those]
        weights, alphas = [], []
        for n, raw in zip(those, scores, strict=True):
            if k_scales is not None:
                raw *= factors(k_scales, n)
            score = jnp.where(visible, raw, -jnp.inf)
            before = softmax.m[n]
            now = jnp.maximum(before, jnp.max(score, axis=-1, keepdims=True))
            weight = jnp.exp(score - _wide(now, tiles.block))
            alpha = jnp.exp(before - now)
            softmax.m[n] = now
            softmax.l[n] = alpha * softmax.l[n] + _lane_sums(weight)
            if v_scales is not None:
                scaled = weight * factors(v_scales, n)
                weight = jnp.where(slot < seen.valid, scaled, 0.0)
            weights.append(weight.astype(dtype))
            alphas.append(alpha)
        for n, weight, alpha in zip(those, weights, alphas, strict=True):
            new = product(weight, v_ref, n, 0)
            softmax.sums[n] = softmax.sums[n] * _wide(alpha, width) + new


def finish(softmax: Softmax, out_ref: Any) -> None:
    """What a row found, when all of its blocks are taken in."""
    for n in range(softmax.sums.shape[0]):
        total = jnp.sum(softmax.l[n], axis=-1, keepdims=True)
        out_ref[0, n] = (softmax.sums[n] / total).astype(out_ref.dtype)


def clear(tiles: Tiling, values: Any, valid: Any) -> None:
    """Zeros behind the valid slots of a block: what lies there may be no number."""
    axis = 2 if tiles.slots_last else 1
    step = math.gcd(tiles.block, LANES if tiles.slots_last else 32)

    def one(n: Any, _: None) -> None:
        first = pl.multiple_of(n * step, step)
        at = (slice(None),) * axis + (pl.ds(first, step),)
        piece = values[at]
        slot = first + jax.lax.broadcasted_iota(jnp.int32, piece.shape, axis)
        values[at] = jnp.where(slot < valid, piece, jnp.zeros_like(piece))

    begin = jax.lax.div(valid, jnp.int32(step))
    jax.lax.fori_loop(begin, tiles.block // step, one, None)


def _wide(x: Any, lanes: int) -> Any:
    """More or fewer of lanes that are equal."""
    return jnp.concatenate([x] * -(-lanes // LANES), axis=1)[:, :lanes]


def _lane_sums(x: Any) -> Any:
    """128 lanes that add up to what the lanes of each row do."""
    if x.shape[1] % LANES:
        lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
        return jnp.where(lane == 0, jnp.sum(x, axis=-1, keepdims=True), 0.0)
    return sum(x[:, n : n + LANES] for n in range(0, x.shape[1], LANES))
