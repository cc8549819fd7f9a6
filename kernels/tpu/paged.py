r"""Attention of few queries over a paged cache, on a TPU.

The pages `[P, K, C, H]` stay in HBM. A block is about a megabyte of a row's pages, each
fetched by its own copy:

    table, row 1   | 7 | 2 | 9 | 4 |        in SMEM, before the kernel begins
                     |   |   |   (page 4 is after the row's length)
    HBM            |.0.|.1.|#2#|.3.|.4.|.5.|.6.|#7#|.8.|#9#|
                             \__________________/     |
    VMEM, block 0  | 7 | 2 |           block 1  | 9 |   |

Only pages up to the row's length are read. How blocks are prefetched is in `streamed`,
what is computed from one in `streamed_tiles`.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.reference import Pages
from llama_jax.kernels.refs import AsyncCopy, Ref, Scalar
from llama_jax.kernels.tpu.flash_tiles import LANES
from llama_jax.kernels.tpu.streamed import Fetch, streamed_attention
from llama_jax.kernels.tpu.streamed_tiles import Tiling, slots_at, tiling


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
    """Compute `kernels.paged_attention` for decoding: T · G ≤ 128, no gradient.

    Slots after a row's last query are never used, whatever they hold.

    Args:
      q: queries, bfloat16 or float32.
      k_pages: pages of keys.
      v_pages: pages of values.
      page_table: pages of each row.
      q_start: slot of each row's first query.
      block_slots: slots of a block, rounded down to whole pages and a multiple of 128;
        defaults to those of a megabyte.
      cores: cores of a device (two on v4 and v5p), which share the heads.
      interpret: run in interpret mode, on any device.

    Raises:
      ValueError: T · G is too large, the dtype of the queries is not supported, or C is
        no multiple of 8, or of 128 if pages are int8 or H is no multiple of 128.
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
    """The blocks of a paged cache."""

    tiles: Tiling
    page: int
    pages_of_row: int

    def first(self, block: Array) -> Array:
        return block * self.tiles.block

    def start(self, scalars: Sequence[Ref], fetch: Fetch) -> None:
        def one(n: Scalar, _: None = None) -> None:
            for copy in self._copies(scalars, fetch, n):
                copy.start()

        whole, valid = self.tiles.block // self.page, self._valid(fetch)

        @pl.when(valid == whole)
        def all_pages() -> None:
            for n in range(whole):
                one(n)

        @pl.when(valid < whole)
        def some_pages() -> None:
            jax.lax.fori_loop(0, valid, one, None)

    def wait(self, scalars: Sequence[Ref], fetch: Fetch) -> None:
        def one(n: Array, _: None) -> None:
            for copy in self._copies(scalars, fetch, n):
                copy.wait()

        whole, valid = self.tiles.block // self.page, self._valid(fetch)

        @pl.when(valid == whole)
        def all_pages() -> None:
            # Semaphores count bytes: one wait covers all pages.
            for _, buffer, arrived in fetch.parts:
                pltpu.make_async_copy(buffer, buffer, arrived).wait()

        @pl.when(valid < whole)
        def some_pages() -> None:
            jax.lax.fori_loop(0, valid, one, None)

    def _valid(self, fetch: Fetch) -> Array:
        """Pages of the block up to the row's length."""
        whole = self.tiles.block // self.page
        pages = pl.cdiv(fetch.length, self.page) - fetch.block * whole
        return jnp.minimum(pages, whole)

    def _copies(
        self, scalars: Sequence[Ref], fetch: Fetch, n: Scalar
    ) -> list[AsyncCopy]:
        index = fetch.block * (self.tiles.block // self.page) + n
        page = scalars[1][fetch.row * self.pages_of_row + index]
        first = pl.multiple_of(n * self.page, self.page)  # type: ignore[arg-type]
        slots = pl.ds(first, self.page)
        return [
            pltpu.make_async_copy(
                part.at[page, fetch.heads],
                slots_at(buffer, self.tiles, slots, slice(None)),
                arrived,
            )
            for part, buffer, arrived in fetch.parts
        ]
