"""Attention of few queries over the cache, on a TPU.

The cache `[B, K, S, H]` stays in HBM as it lies. Of a row only the blocks up to its
length are read, each `[heads, block, H]` by one strided copy (`#` slots that are seen,
blank blocks that are not read):

    row 0   |####|####|##  |    |    |   |
    row 1   |####|#   |    |    |    |   |
    row 2   |####|####|####|####|####|###|

Where S is no multiple of the block, the last block ends with S and so begins within
the one before; its slots that were seen already are masked. How blocks are fetched
ahead is in `streamed_tpu`, what is done with one in `streamed_tiles`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.reference import Slots
from llama_jax.kernels.tpu.streamed import Parcel, streamed_attention
from llama_jax.kernels.tpu.streamed_tiles import LANES, Tiling, slots_at, tiling


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
    """`attention` for decoding: T · G at most 128, and no gradient.

    Slots behind a row's last query are never looked at, whatever lies there. The cache
    is read in place where S is a multiple of 8; XLA lays other arrays out differently
    and would copy them.

    Args:
      q: queries, bfloat16 or float32.
      k: keys.
      v: values.
      q_start: slot of each row's first query; `q_start + T` is at most S.
      block_slots: slots of a block, rounded down to a multiple of 128; those of a
        megabyte where not given.
      cores: of a device (two on v4 and v5p), among which the heads are divided.
      interpret: run on any device, slowly.

    Raises:
      ValueError: T · G is too large, the queries have another type, or S is no
        multiple of 128 where the cache is in eight bits or H no multiple of 128.
    """
    slots = k.shape[2]

    def block(megabyte: int) -> int:
        wanted = min(slots, block_slots or megabyte)
        return min(slots, max(LANES, wanted // LANES * LANES))

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
    tiles: Tiling
    slots: int

    def first(self, block: Any) -> Any:
        first = block * self.tiles.block
        if self.slots % self.tiles.block:
            first = jnp.minimum(first, self.slots - self.tiles.block)
        return first

    def start(self, scalars: Any, parcel: Parcel) -> None:
        for copy in self._copies(parcel):
            copy.start()

    def wait(self, scalars: Any, parcel: Parcel) -> None:
        for copy in self._copies(parcel):
            copy.wait()

    def _copies(self, parcel: Parcel) -> list[Any]:
        aligned = next(n for n in (LANES, 64, 32, 16, 8, 1) if self.slots % n == 0)
        first = pl.multiple_of(self.first(parcel.block), aligned)
        slots = pl.ds(first, self.tiles.block)
        return [
            pltpu.make_async_copy(
                slots_at(part, self.tiles, slots, parcel.row, parcel.heads), *rest
            )
            for part, *rest in parcel.parts
        ]
