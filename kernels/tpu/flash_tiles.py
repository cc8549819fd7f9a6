"""What the passes of the TPU's flash attention share: which tiles they walk, and how.

A tile is a block of queries against a block of slots. Its kind (left out, whole, or
mixed) follows from numbers that lie in SMEM, before anything of it is read.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

from llama_jax.kernels.reference import precision_of

LANES = 128
STRIP = 512  # queries that are taken together where some see only a part
MASKED = -0.7 * float(np.finfo(np.float32).max)  # finite: its differences are no NaN
LOG2_E = float(np.log2(np.e))


class Tiles(NamedTuple):
    """Sizes: of a block of queries, a block of slots, and how many slots are copied.

    A step of the grid takes a block of queries and a window, which is several blocks of
    slots: a step costs some 300 bundles besides what it computes.
    """

    q: int
    kv: int
    window: int = 2048

    def within(self, queries: int, slots: int) -> "Tiles":
        """The sizes for arrays that may be smaller."""
        kv = min(self.kv, slots)
        return Tiles(
            min(self.q, queries), kv, max(min(self.window, slots) // kv, 1) * kv
        )


class Segments(NamedTuple):
    """Segment ids, and the smallest and largest of every block of them."""

    q: Int[Array, "B 1 T"]
    kv: Int[Array, "B 1 S"]
    q_bounds: Int[Array, "B 2 blocks"]
    kv_bounds: Int[Array, "B 2 blocks"]


def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """A matrix product over the two axes, in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision_of(a.dtype),
        preferred_element_type=jnp.float32,
    )


def tile_list(
    queries: int, slots: int, tiles: Tiles, *, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Block of queries and window of every step: on and under the diagonal, or all."""
    rows, columns = -(-queries // tiles.q), -(-slots // tiles.window)
    found = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if not causal or j * tiles.window < (i + 1) * tiles.q
    ]
    q, kv = np.asarray(found, np.int32).T
    return q, kv


def bounds(ids: Int[Array, "B T"], block: int, window: int) -> Int[Array, "B 2 blocks"]:
    """Smallest and largest segment of each block, of as many as fill the windows."""
    padded = -ids.shape[1] % window
    blocks = jnp.pad(ids, ((0, 0), (0, padded)), mode="edge")
    blocks = blocks.reshape(ids.shape[0], -1, block)
    return jnp.stack([blocks.min(-1), blocks.max(-1)], axis=1)


def segments_of(
    q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"], tiles: Tiles
) -> Segments:
    """What the kernels read of the segment ids of packed rows."""
    q_ids, kv_ids = q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)
    return Segments(
        q_ids[:, None],
        kv_ids[:, None],
        bounds(q_ids, tiles.q, tiles.q),
        bounds(kv_ids, tiles.kv, tiles.window),
    )


class Place(NamedTuple):
    """Where a step of the grid is: what decides which parts of it are computed.

    Attributes:
      first_q: slot of its first query.
      first_kv: its first slot.
      slots: S.
      segments: bounds of the queries' segments, and a function that gives those of the
        n-th block of slots; None where rows are not packed.
    """

    first_q: Any
    first_kv: Any
    slots: int
    segments: tuple[Any, Callable[[Any], Any]] | None


def block_bounds(ref: Any, row: Any, block: Any) -> tuple[Any, Any]:
    """Of a block's segments, from SMEM."""
    return ref[row, 0, block], ref[row, 1, block]


def place_of(scalars: Any, bounds: Any, step: Any, tiles: Tiles, slots: int) -> Place:
    """Where a step is, from what lies in SMEM; the first axis of the grid is B."""
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
    return Place(start[row] + i * tiles.q, j * tiles.window, slots, segments)


def is_last_of_block(q_of: Any, step: Any, steps: Any) -> Any:
    """Whether the next step is of another block of queries."""
    return (step == steps - 1) | (q_of[jnp.minimum(step + 1, steps - 1)] != q_of[step])


def window_read(tiles: Tiles, slots: int, row: Any, step: Any, *scalars: Any) -> Any:
    """Which window a step copies; one that nobody sees is not: the last is kept."""
    start, q_of, kv_of = scalars[:3]
    final = start[row] + (q_of[step] + 1) * tiles.q - 1
    last = jnp.int32(-(-slots // tiles.window) - 1)
    visible = jnp.clip(jax.lax.div(final, jnp.int32(tiles.window)), 0, last)
    return jnp.minimum(kv_of[step], visible)


def walk(
    tiles: Tiles, place: Place, attend: Callable[[Any, int, Any, bool], None]
) -> None:
    """Call `attend` for whatever is visible at a step of the grid.

    Its arguments are the place and number of queries, the place in the window, and
    whether some of these queries do not see some of that block of slots.
    """

    def kind_of(at: Any, queries: int, block: Any) -> tuple[Any, Any]:
        """Whether anything is visible, and whether everything is."""
        q, kv = place.first_q + at, place.first_kv + block * tiles.kv
        visible = kv <= q + queries - 1
        whole = kv + tiles.kv - 1 <= q
        if place.slots % tiles.window:  # the last window hangs over the edge
            visible &= kv < place.slots
            whole &= kv + tiles.kv <= place.slots
        if place.segments is not None:
            (q_low, q_high), of_block = place.segments
            kv_low, kv_high = of_block(block)
            visible &= (kv_low <= q_high) & (q_low <= kv_high)
            whole &= (q_low == kv_high) & (q_high == kv_low)
        return visible, whole

    def take(block: Any, at_kv: Any) -> None:
        def strip(at: Any, size: int) -> None:
            visible, whole = kind_of(at, size, block)
            pl.when(whole)(lambda: attend(at, size, at_kv, False))
            pl.when(visible & ~whole)(lambda: attend(at, size, at_kv, True))

        visible, whole = kind_of(0, tiles.q, block)
        pl.when(whole)(lambda: attend(0, tiles.q, at_kv, False))
        pl.when(visible & ~whole)(lambda: _each(tiles.q, STRIP, strip))

    _each(tiles.window, tiles.kv, lambda at, _: take(jax.lax.div(at, tiles.kv), at))


def _each(total: int, step: int, take: Callable[[Any, int], None]) -> None:
    """Call with the place and the size of every part, or of all where none fit."""
    if total == step or total % step:
        take(0, total)
        return

    @pl.loop(0, total // step)
    def _(index: Any) -> None:
        take(pl.multiple_of(index * step, step), step)


def across(row: Int[Array, "1 T"]) -> Int[Array, "T 1"]:
    """A row of numbers as a column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
