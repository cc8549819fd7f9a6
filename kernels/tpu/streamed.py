r"""Attention of few queries over keys and values that stream through a TPU's VMEM.

What `decode_tpu` and `paged_tpu` share: everything but where a block of slots lies.

    HBM     keys, values     | block 0 | block 1 | block 2 | ...       never copied
                                   \        |        /    asynchronous, two ahead
    VMEM    ring of three blocks  [heads, block, H] of keys, and of values
                                             |
    MXU     what queries do with a block is in `streamed_tiles`
                                             |
    VMEM    the softmax so far, of the row that is at work
    SMEM    first slots, page table, which block is fetched and taken next

Reading the cache takes the time; the arithmetic only has to stay below it.

The grid goes over groups of heads (of which 128 slots are at most a megabyte) and the
rows of the batch. The loop over blocks is inside and as long as the row. What is
fetched ahead does not stop at a row's end but goes on with the next row's first block.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.tpu.streamed_tiles import (
    LANES,
    Seen,
    Softmax,
    Tiling,
    attend,
    begin,
    clear,
    finish,
)

_DEPTH = 3  # blocks in VMEM


class Parcel(NamedTuple):
    """One block on its way: of which row, and where it comes from and goes.

    Attributes:
      row: of the batch.
      block: of the row.
      length: slots of the row that are seen.
      heads: slice of key/value heads.
      parts: of keys, values and their scales: all of it in HBM, its place in VMEM
        (`[heads, block, H]`, `[heads, H, block]` or `[heads, block]`), a semaphore.
    """

    row: Any
    block: Any
    length: Any
    heads: Any
    parts: Sequence[tuple[Any, Any, Any]]


@runtime_checkable
class Source(Protocol):
    """Where a row's blocks lie."""

    def first(self, block: Any) -> Any:
        """The slot a block begins with; a later one than `block · size` never."""

    def start(self, scalars: Sequence[Any], parcel: Parcel) -> None:
        """Start the copies."""

    def wait(self, scalars: Sequence[Any], parcel: Parcel) -> None:
        """Wait until they have arrived."""


def streamed_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "_ K _ H"] | QuantizedSlots,
    v: Float[Array, "_ K _ H"] | QuantizedSlots,
    scalars: Sequence[Int[Array, " _"]],
    *,
    tiles: Tiling,
    source: Source,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Run the kernel.

    Args:
      q: queries.
      k: the cache or pages.
      v: likewise.
      scalars: `q_start`, then what `source` needs.
      tiles: how to cut.
      source: where blocks lie.
      interpret: run anywhere, slowly.
    """
    batch, queries, num_heads, width = q.shape
    cache, structure = jax.tree.flatten((k, v))
    if tiles.slots_last:
        cache = [part.swapaxes(2, 3) if part.ndim == 4 else part for part in cache]
    # [B, T, N, H] to [B, tiles, rows, H], with a head's queries next to each other
    groups = num_heads // tiles.group // tiles.pack
    shape = (batch, queries, groups * tiles.pack, tiles.group, width)
    packed = q.reshape(shape).swapaxes(1, 2).reshape(batch, groups, -1, width)
    used = packed.shape[2]
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, tiles.rows - used), (0, 0)))
    of_row = pl.BlockSpec(
        (1, tiles.score_tiles, tiles.rows, width),
        lambda split, row, *_: (row, split, 0, 0),
    )

    def ring(part: Array) -> Any:
        sides = [tiles.block] if part.ndim == 3 else [tiles.block, width]
        if tiles.slots_last:
            sides.reverse()
        return pltpu.VMEM((_DEPTH, tiles.heads, *sides), part.dtype)

    softmax = Softmax(
        m=pltpu.VMEM((tiles.score_tiles, tiles.rows, LANES), jnp.float32),
        l=pltpu.VMEM((tiles.score_tiles, tiles.rows, LANES), jnp.float32),
        sums=pltpu.VMEM((tiles.score_tiles, tiles.rows, width), jnp.float32),
        last=pltpu.VMEM((tiles.rows, LANES), jnp.int32),
    )
    out = pl.pallas_call(
        functools.partial(_kernel, tiles, source, structure, len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_heads // tiles.group // tiles.heads, batch),
            in_specs=[of_row, *[pl.BlockSpec(memory_space=pltpu.HBM) for _ in cache]],
            out_specs=of_row,
            scratch_shapes=[
                softmax,
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((len(cache), _DEPTH)),
                *map(ring, cache),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(packed.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")
        ),
        interpret=interpret,
    )(*scalars, packed, *cache)
    out = out[:, :, :used].reshape(batch, -1, queries, tiles.group, width)
    return out.swapaxes(1, 2).reshape(q.shape)


def _kernel(
    tiles: Tiling, source: Source, structure: Any, num_scalars: int, *refs: Any
) -> None:
    scalars, (q_ref, *rest) = refs[:num_scalars], refs[num_scalars:]
    parts = structure.num_leaves
    cache, rest = rest[:parts], rest[parts:]
    out_ref, softmax, cursor, arrived, *rings = rest
    q_start = scalars[0]
    row, batch = pl.program_id(1), pl.num_programs(1)
    heads = pl.ds(pl.program_id(0) * tiles.heads, tiles.heads)

    def length(row: Any) -> Any:
        return q_start[row] + tiles.queries

    def blocks(row: Any) -> Any:
        return pl.cdiv(length(row), tiles.block)

    def parcel(row: Any, block: Any, place: Any) -> Parcel:
        parts = [
            (part, ring.at[place], arrived.at[n, place])
            for n, (part, ring) in enumerate(zip(cache, rings, strict=True))
        ]
        return Parcel(row, block, length(row), heads, parts)

    def following(place: Any) -> Any:
        return jnp.where(place + 1 == _DEPTH, 0, place + 1)

    # What is fetched next: row, block and its place in the rings; the place of the
    # block that is taken next.
    fetch_row, fetch_block, fetch_place, take_place = range(4)

    def fetch(*_: Any) -> None:
        at, block, place = cursor[fetch_row], cursor[fetch_block], cursor[fetch_place]

        @pl.when(at < batch)
        def start() -> None:
            source.start(scalars, parcel(at, block, place))
            ended = block + 1 >= blocks(at)
            cursor[fetch_row] = jnp.where(ended, at + 1, at)
            cursor[fetch_block] = jnp.where(ended, 0, block + 1)
            cursor[fetch_place] = following(place)

    @pl.when(row == 0)
    def fetch_first() -> None:
        for n in range(4):
            cursor[n] = 0
        jax.lax.fori_loop(0, _DEPTH - 1, fetch, None)

    def take(block: Any, _: None) -> None:
        place = cursor[take_place]
        cursor[take_place] = following(place)
        fetch()
        source.wait(scalars, parcel(row, block, place))
        k, v = structure.unflatten([ring.at[place] for ring in rings])
        # Where blocks overlap, slots that the one before had are not seen again.
        first = source.first(block)
        seen = Seen(first, block * tiles.block - first, length(row) - first)
        if not isinstance(v, QuantizedSlots):  # whose values are numbers anyway

            @pl.when(block + 1 == blocks(row))
            def clear_rest() -> None:
                clear(tiles, v, seen.valid)

        attend(tiles, q_ref, k, v, softmax, seen)

    begin(tiles, softmax, q_start[row])
    jax.lax.fori_loop(0, blocks(row), take, None)
    finish(softmax, out_ref)
