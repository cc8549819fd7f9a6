"""Tiles of the TPU's flash attention: which ones the passes visit, and how.

A tile is a block of queries by a block of slots. Its kind (skipped, whole, or mixed)
follows from scalars in SMEM, before any of its data is read.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from llama_jax.kernels.refs import Ref, Scalar

LANES = 128
STRIP = 512  # queries of a strip of a mixed tile
MASKED = -0.7 * float(np.finfo(np.float32).max)  # finite, so differences are never NaN
LOG2_E = float(np.log2(np.e))

Block: TypeAlias = tuple[Scalar, Scalar, Scalar, Scalar]
"""Where a block of an array `[B, N, T, H]` is, in blocks."""

Bounds: TypeAlias = tuple[Array, Array]
"""Smallest and largest segment of a block."""


class Tiles(NamedTuple):
    """Sizes of a block of queries, a block of slots, and a window of slots.

    A grid step has an overhead of about 300 bundles, so it covers a block of queries
    and a window, which is several blocks of slots.
    """

    q: int
    kv: int
    window: int = 2048

    def within(self, queries: int, slots: int) -> "Tiles":
        """The sizes, reduced to those of smaller arrays."""
        kv = min(self.kv, slots)
        return Tiles(
            min(self.q, queries), kv, max(min(self.window, slots) // kv, 1) * kv
        )


class Segments(NamedTuple):
    """Segment ids, and the smallest and largest of every block."""

    q: Int[Array, "B 1 T"]
    kv: Int[Array, "B 1 S"]
    q_bounds: Int[Array, "B 2 blocks"]
    kv_bounds: Int[Array, "B 2 blocks"]


def tile_list(
    queries: int, slots: int, tiles: Tiles, *, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Block of queries and window of every grid step, up to the diagonal or all."""
    rows, columns = -(-queries // tiles.q), -(-slots // tiles.window)
    steps = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if not causal or j * tiles.window < (i + 1) * tiles.q
    ]
    q, kv = np.asarray(steps, np.int32).T
    return q, kv


def bounds(ids: Int[Array, "B T"], block: int, window: int) -> Int[Array, "B 2 blocks"]:
    """Smallest and largest segment of each block, padded to whole windows."""
    padded = -ids.shape[1] % window
    blocks = jnp.pad(ids, ((0, 0), (0, padded)), mode="edge")
    blocks = blocks.reshape(ids.shape[0], -1, block)
    return jnp.stack([blocks.min(-1), blocks.max(-1)], axis=1)


def segments_of(
    q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"], tiles: Tiles
) -> Segments:
    """The segment ids of packed rows, as the kernels read them."""
    q_ids, kv_ids = q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    return Segments(
        q_ids[:, None],
        kv_ids[:, None],
        bounds(q_ids, tiles.q, tiles.q),
        bounds(kv_ids, tiles.kv, tiles.window),
    )


def segment_operands(
    ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    tiles: Tiles,
    q_block: Callable[..., Block],
    kv_block: Callable[..., Block],
) -> tuple[list[Array], list[Array], list[pl.BlockSpec]]:
    """Scalars, arrays and block specs of packed rows; empty if rows are not packed.

    Args:
      ids: segments of queries and of slots.
      tiles: tile sizes.
      q_block: index map of the queries, `[B, N, T, H]`.
      kv_block: index map of keys and values.
    """
    if ids is None:
        return [], [], []
    q, kv, q_bounds, kv_bounds = segments_of(ids[0], ids[1], tiles)
    specs = [
        pl.BlockSpec((1, 1, size), lambda *at, block=block: (at[0], 0, block(*at)[2]))
        for size, block in ((tiles.q, q_block), (tiles.window, kv_block))
    ]
    return [q_bounds, kv_bounds], [q, kv], specs


class Step(NamedTuple):
    """A grid step: the scalars that decide which parts of it are computed.

    Attributes:
      first_q: slot of its first query.
      first_kv: its first slot.
      slots: S.
      segments: bounds of the queries' segments, and a function that returns those of
        the n-th block of slots; None if rows are not packed.
    """

    first_q: Array
    first_kv: Array
    slots: int
    segments: tuple[Bounds, Callable[[Scalar], Bounds]] | None


def block_bounds(ref: Ref, row: Array, block: Array) -> Bounds:
    """Smallest and largest segment of a block, from SMEM."""
    return ref[row, 0, block], ref[row, 1, block]


def grid_step(
    scalars: Sequence[Ref], bounds: Sequence[Ref], step: Array, tiles: Tiles, slots: int
) -> Step:
    """The step's scalars, from SMEM; the first axis of the grid is B."""
    (start, q_of, kv_of), row = scalars, pl.program_id(0)
    i, j = q_of[step], kv_of[step]
    segments = None
    if bounds:
        of_q, of_kv = bounds
        first = j * (tiles.window // tiles.kv)
        segments = (
            block_bounds(of_q, row, i),
            lambda n: block_bounds(of_kv, row, first + n),
        )
    return Step(start[row] + i * tiles.q, j * tiles.window, slots, segments)


def is_last_of_block(q_of: Ref, step: Array, steps: Scalar) -> Array:
    """Whether the next step has another block of queries."""
    return (step == steps - 1) | (q_of[jnp.minimum(step + 1, steps - 1)] != q_of[step])


def window_read(
    tiles: Tiles, slots: int, row: Array, step: Array, *scalars: Ref
) -> Array:
    """The window that a step reads: its own if visible, else the last one again.

    A window that is the same as in the step before is not copied.
    """
    start, q_of, kv_of = scalars[:3]
    final = start[row] + (q_of[step] + 1) * tiles.q - 1
    last = jnp.int32(-(-slots // tiles.window) - 1)
    visible = jnp.clip(jax.lax.div(final, jnp.int32(tiles.window)), 0, last)
    return jnp.minimum(kv_of[step], visible)


def walk(
    tiles: Tiles, step: Step, attend: Callable[[Scalar, int, Scalar, bool], None]
) -> None:
    """Call `attend` for all visible parts of a grid step.

    Its arguments are the offset and number of queries, the offset in the window, and
    whether a mask is needed.
    """

    def kind_of(at: Scalar, queries: int, block: Scalar) -> tuple[Array, Array]:
        """Whether anything is visible, and whether everything is."""
        q, kv = step.first_q + at, step.first_kv + block * tiles.kv
        visible = kv <= q + queries - 1
        whole = kv + tiles.kv - 1 <= q
        if step.slots % tiles.window:  # the last window is partial
            visible &= kv < step.slots
            whole &= kv + tiles.kv <= step.slots
        if step.segments is not None:
            (q_low, q_high), of_block = step.segments
            kv_low, kv_high = of_block(block)
            visible &= (kv_low <= q_high) & (q_low <= kv_high)
            whole &= (q_low == kv_high) & (q_high == kv_low)
        return visible, whole

    def take(block: Scalar, at_kv: Scalar) -> None:
        def strip(at: Scalar, size: int) -> None:
            visible, whole = kind_of(at, size, block)
            pl.when(whole)(lambda: attend(at, size, at_kv, False))
            pl.when(visible & ~whole)(lambda: attend(at, size, at_kv, True))

        visible, whole = kind_of(0, tiles.q, block)
        pl.when(whole)(lambda: attend(0, tiles.q, at_kv, False))
        pl.when(visible & ~whole)(lambda: _each(tiles.q, STRIP, strip))

    _each(tiles.window, tiles.kv, lambda at, _: take(jax.lax.div(at, tiles.kv), at))


def _each(total: int, step: int, take: Callable[[Scalar, int], None]) -> None:
    """Call `take(offset, size)` for parts of a size, or once if it does not divide."""
    if total == step or total % step:
        take(0, total)
        return

    @pl.loop(0, total // step)
    def _(index: Array) -> None:
        take(pl.multiple_of(index * step, step), step)


def across(row: Int[Array, "1 T"]) -> Int[Array, "T 1"]:
    """Transpose a row into a column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def wide(column: Shaped[Array, "T 128"], width: int) -> Shaped[Array, "T {width}"]:
    """A column that is the same in every lane, over another number of lanes."""
    if width <= LANES:
        return column[:, :width]
    whole = jnp.concatenate([column] * (width // LANES), axis=1)
    rest = width % LANES
    return jnp.concatenate([whole, column[:, :rest]], axis=1) if rest else whole


def lane_sums(x: Float[Array, "T S"]) -> Float[Array, "T 128"]:
    """Partial sums over S, one per lane: lanes are added up once, at the end."""
    if x.shape[1] % LANES:
        total = jnp.sum(x, axis=1, keepdims=True)
        lane = jax.lax.broadcasted_iota(jnp.int32, (x.shape[0], LANES), 1)
        return jnp.where(lane == 0, total, 0.0)
    parts = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)
