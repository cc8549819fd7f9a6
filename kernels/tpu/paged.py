r"""Attention of few queries over pages, on a TPU.

The pages `[P, K, C, H]` stay in HBM as they lie. A block is as many pages of a row as
make about a megabyte, each brought by a copy of its own to its place in the block:

    table, row 1   | 7 | 2 | 9 | 4 |        in SMEM, before the kernel begins
                     |   |   |   not behind the row's length
    HBM            |.0.|.1.|#2#|.3.|.4.|.5.|.6.|#7#|.8.|#9#|
                             \__________________/     |
    VMEM, block 0  | 7 | 2 |           block 1  | 9 |   |

Of a block's pages only those are read that the row has. How blocks are fetched ahead is
in `streamed_tpu`, what is done with one in `streamed_tiles`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.reference import Pages
from llama_jax.kernels.tpu.streamed import Parcel, streamed_attention
from llama_jax.kernels.tpu.streamed_tiles import LANES, Tiling, slots_at, tiling


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int[Array, "B M"],
    *,
    q_start: Int[Array, " B"],
    block_slots: int | None = None,
    cores: int = 1,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`paged_attention` for decoding: T · G at most 128, and no gradient.

    Slots behind a row's last query are never looked at, whatever lies there.

    Args:
      q: queries, bfloat16 or float32.
      k_pages: pages of keys.
      v_pages: of values.
      page_table: where each row's pages lie.
      q_start: slot of each row's first query.
      block_slots: slots of a block, rounded down to whole pages and a multiple of 128;
        those of a megabyte where not given.
      cores: of a device (two on v4 and v5p), among which the heads are divided.
      interpret: run on any device, slowly.

    Raises:
      ValueError: T · G is too large, the queries have another type, C is no multiple
        of 8, or none of 128 where pages are in eight bits or H no multiple of 128.
    """
    page = k_pages.shape[2]

    def block(megabyte: int) -> int:
        unit = math.lcm(page, LANES)
        return max(unit, (block_slots or megabyte) // unit * unit)

    tiles = tiling(q, k_pages, block, cores)
    return streamed_attention(
        q,
        k_pages,
        v_pages,
        (q_start, page_table.reshape(-1)),
        tiles=tiles,
        source=_Pages(tiles, page, page_table.shape[1]),
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True)
class _Pages:
    tiles: Tiling
    page: int
    pages_of_row: int

    def first(self, block: Any) -> Any:
        return block * self.tiles.block

    def start(self, scalars: Any, parcel: Parcel) -> None:
        def one(n: Any, _: None = None) -> None:
            for copy in self._copies(scalars, parcel, n):
                copy.start()

        whole, valid = self.tiles.block // self.page, self._valid(parcel)

        @pl.when(valid == whole)
        def all_pages() -> None:
            for n in range(whole):
                one(n)

        @pl.when(valid < whole)
        def some_pages() -> None:
            jax.lax.fori_loop(0, valid, one, None)

    def wait(self, scalars: Any, parcel: Parcel) -> None:
        def one(n: Any, _: None) -> None:
            for copy in self._copies(scalars, parcel, n):
                copy.wait()

        whole, valid = self.tiles.block // self.page, self._valid(parcel)

        @pl.when(valid == whole)
        def all_pages() -> None:
            # A semaphore counts bytes: one wait for those of all pages.
            for _, place, arrived in parcel.parts:
                pltpu.make_async_copy(place, place, arrived).wait()

        @pl.when(valid < whole)
        def some_pages() -> None:
            jax.lax.fori_loop(0, valid, one, None)

    def _valid(self, parcel: Parcel) -> Any:
        """Pages of the block that the row has."""
        whole = self.tiles.block // self.page
        pages = pl.cdiv(parcel.length, self.page) - parcel.block * whole
        return jnp.minimum(pages, whole)

    def _copies(self, scalars: Any, parcel: Parcel, n: Any) -> list[Any]:
        first = parcel.block * (self.tiles.block // self.page)
        page = scalars[1][parcel.row * self.pages_of_row + first + n]
        slots = pl.ds(pl.multiple_of(n * self.page, self.page), self.page)
        return [
            pltpu.make_async_copy(
                part.at[page, parcel.heads],
                slots_at(place, self.tiles, slots, slice(None)),
                arrived,
            )
            for part, place, arrived in parcel.parts
        ]
