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
STRIP = 512  # queries of a mixed tile that are taken together
MASKED = -0.7 * float(np.finfo(np.float32).max)  # finite: its differences are no NaN
LOG2_E = float(np.log2(np.e))


class Tiles(NamedTuple):
    """Block sizes, in queries and in slots."""

    q: int
    kv: int


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
    """Blocks of q and of kv of every tile: those on and under the diagonal, or all."""
    rows, columns = -(-queries // tiles.q), -(-slots // tiles.kv)
    found = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if not causal or j * tiles.kv < (i + 1) * tiles.q
    ]
    q, kv = np.asarray(found, np.int32).T
    return q, kv


def bounds(ids: Int[Array, "B T"], block: int) -> Int[Array, "B 2 blocks"]:
    """Smallest and largest segment of each block."""
    padded = -ids.shape[1] % block
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
        bounds(q_ids, tiles.q),
        bounds(kv_ids, tiles.kv),
    )


class Kind(NamedTuple):
    """Of a tile or a strip: whether anything in it is visible, and whether all is."""

    visible: Array
    whole: Array


def kind_of(
    first_q: Any, queries: int, first_kv: Any, slots: int, total: int, ids: Any = None
) -> Kind:
    """The kind of a tile of queries at slots `first_q` on, and slots `first_kv` on.

    `ids` are the bounds of both sides' segments, `total` is S.
    """
    visible = first_kv <= first_q + queries - 1
    whole = first_kv + slots - 1 <= first_q
    if total % slots:  # the last block hangs over the edge
        whole &= first_kv + slots <= total
    if ids is not None:
        (q_low, q_high), (kv_low, kv_high) = ids
        visible &= (kv_low <= q_high) & (q_low <= kv_high)
        whole &= (q_low == kv_high) & (q_high == kv_low)
    return Kind(visible, whole)


def block_bounds(ref: Any, row: Any, block: Any) -> tuple[Any, Any]:
    """Of a block's segments, from SMEM."""
    return ref[row, 0, block], ref[row, 1, block]


def each_strip(queries: int, take: Callable[[Any, int], None]) -> None:
    """Call with the place and the size of every strip of a block of queries."""
    if queries == STRIP or queries % STRIP:
        take(0, queries)
        return

    @pl.loop(0, queries // STRIP)
    def _(index: Any) -> None:
        take(pl.multiple_of(index * STRIP, STRIP), STRIP)


def across(row: Int[Array, "1 T"]) -> Int[Array, "T 1"]:
    """A row of numbers as a column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]
