"""Attention of few queries over a dense cache, on a TPU.

The cache `[B, K, S, H]` stays in HBM. Only the blocks up to a row's length are read,
each `[heads, block, H]` by one strided copy (`#`: slots that are attended to; blank
blocks are not read):

    row 0   |####|####|##  |    |    |   |
    row 1   |####|#   |    |    |    |   |
    row 2   |####|####|####|####|####|###|

If S is no multiple of the block, the last block ends at S and overlaps the one before;
its repeated slots are masked. How blocks are prefetched is in `streamed`, what is
computed from one in `streamed_tiles`.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.reference import Slots
from llama_jax.kernels.refs import AsyncCopy, Ref
from llama_jax.kernels.tpu.flash_tiles import LANES
from llama_jax.kernels.tpu.streamed import Fetch, streamed_attention
from llama_jax.kernels.tpu.streamed_tiles import Tiling, slots_at, tiling


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"],
    block_slots: int | None = None,
    cores: int = 1,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute `kernels.attention` for decoding: T · G ≤ 128, not differentiable.

    Slots after a row's last query are never used, whatever they hold. S must be a
    multiple of 8, so that the cache is read in place: XLA lays out other arrays
    differently and would copy them.

    Args:
      q: queries, bfloat16 or float32.
      k: keys.
      v: values.
      q_start: slot of each row's first query; `q_start + T` is at most S.
      block_slots: slots of a block, rounded down to a multiple of 128; defaults to
        those of a megabyte.
      cores: cores of a device (two on v4 and v5p), which share the heads.
      interpret: run in interpret mode, on any device.

    Raises:
      ValueError: T · G is too large, the dtype of the queries is not supported, or S is
        no multiple of 8, or of 128 if the cache is int8 or H is no multiple of 128.
    """
    slots = k.shape[2]

    def block(megabyte: int) -> int:
        size = min(slots, block_slots or megabyte)
        return min(slots, max(LANES, size // LANES * LANES))

    tiles = tiling(q, k, block, cores)
    return streamed_attention(
        q,
        k,
        v,
        (q_start,),
        tiles=tiles,
        source=_Rows(tiles, slots),
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The blocks of a dense cache."""

    tiles: Tiling
    slots: int

    def first(self, block: Array) -> Array:
        first = block * self.tiles.block
        if self.slots % self.tiles.block:
            first = jnp.minimum(first, self.slots - self.tiles.block)
        return first

    def start(self, scalars: Sequence[Ref], fetch: Fetch) -> None:
        for copy in self._copies(fetch):
            copy.start()

    def wait(self, scalars: Sequence[Ref], fetch: Fetch) -> None:
        for copy in self._copies(fetch):
            copy.wait()

    def _copies(self, fetch: Fetch) -> list[AsyncCopy]:
        aligned = next(n for n in (LANES, 64, 32, 16, 8, 1) if self.slots % n == 0)
        first = pl.multiple_of(self.first(fetch.block), aligned)
        slots = pl.ds(first, self.tiles.block)
        return [
            pltpu.make_async_copy(
                slots_at(part, self.tiles, slots, fetch.row, fetch.heads), *rest
            )
            for part, *rest in fetch.parts
        ]
