r"""Attention of few queries over keys and values that stream through a TPU's VMEM.

Shared by `decode` and `paged`, which differ in where the blocks of slots are.

    HBM     keys, values     | block 0 | block 1 | block 2 | ...       never copied
                                   \        |        /    asynchronous, two ahead
    VMEM    ring of three blocks  [heads, block, H] of keys, and of values
                                             |
    MXU     products of queries and a block: see `streamed_tiles`
                                             |
    VMEM    softmax so far of the current row
    SMEM    first slots, page table, next block to fetch and to use

Decoding is bound by reading the cache; the arithmetic only has to be faster than that.

The grid is groups of heads (128 slots of which are at most a megabyte) by rows of the
batch; the loop over a row's blocks is inside. Prefetching continues across rows: after
a row's last block comes the first of the next row.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float, Int

from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.refs import Ref
from llama_jax.kernels.tpu.flash_tiles import LANES
from llama_jax.kernels.tpu.streamed_tiles import (
    Seen,
    Slice,
    Softmax,
    Tiling,
    attend,
    begin,
    clear,
    finish,
)

_DEPTH = 3  # blocks in VMEM


class Fetch(NamedTuple):
    """The copy of one block from HBM to VMEM.

    Attributes:
      row: row of the batch.
      block: block of the row.
      length: number of slots that the row attends to.
      heads: slice of key/value heads.
      parts: for keys, values and their scales: the array in HBM, the buffer in VMEM
        (`[heads, block, H]`, `[heads, H, block]` or `[heads, block]`), a semaphore.
    """

    row: Array
    block: Array
    length: Array
    heads: Slice
    parts: Sequence[tuple[Ref, Ref, Ref]]


@runtime_checkable
class Source(Protocol):
    """Where the blocks of a row are in HBM."""

    def first(self, block: Array) -> Array:
        """First slot of a block, at most `block · size`."""

    def start(self, scalars: Sequence[Ref], fetch: Fetch) -> None:
        """Start the copies of a block."""

    def wait(self, scalars: Sequence[Ref], fetch: Fetch) -> None:
        """Wait for the copies of a block."""


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
      k: keys of a dense or paged cache.
      v: values, like `k`.
      scalars: `q_start`, then the scalars of `source`.
      tiles: tile sizes.
      source: where the blocks are.
      interpret: run in interpret mode, on any device.
    """
    batch, queries, num_heads, width = q.shape
    cache, structure = jax.tree.flatten((k, v))
    if tiles.slots_last:
        cache = [part.swapaxes(2, 3) if part.ndim == 4 else part for part in cache]
    # [B, T, N, H] to [B, tiles, rows, H], the queries of a head adjacent.
    groups = num_heads // tiles.group // tiles.pack
    shape = (batch, queries, groups * tiles.pack, tiles.group, width)
    packed = q.reshape(shape).swapaxes(1, 2).reshape(batch, groups, -1, width)
    used = packed.shape[2]
    packed = jnp.pad(packed, ((0, 0), (0, 0), (0, tiles.rows - used), (0, 0)))
    of_row = pl.BlockSpec(
        (1, tiles.score_tiles, tiles.rows, width),
        lambda split, row, *_: (row, split, 0, 0),
    )

    def ring_shape(part: Array) -> tuple[int, ...]:
        sides = [tiles.block] if part.ndim == 3 else [tiles.block, width]
        if tiles.slots_last:
            sides.reverse()
        return (_DEPTH, tiles.heads, *sides)

    out = pl.pallas_call(
        functools.partial(_kernel, tiles, source, structure, len(scalars)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_heads // tiles.group // tiles.heads, batch),
            in_specs=[of_row, *[pl.BlockSpec(memory_space=pltpu.HBM) for _ in cache]],
            out_specs=of_row,
            scratch_shapes=[
                # The fields of `Softmax`.
                pltpu.VMEM((tiles.score_tiles, tiles.rows, LANES), jnp.float32),
                pltpu.VMEM((tiles.score_tiles, tiles.rows, LANES), jnp.float32),
                pltpu.VMEM((tiles.score_tiles, tiles.rows, width), jnp.float32),
                pltpu.VMEM((tiles.rows, LANES), jnp.int32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA((len(cache), _DEPTH)),
                *(pltpu.VMEM(ring_shape(part), part.dtype) for part in cache),
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
    tiles: Tiling, source: Source, structure: PyTreeDef, num_scalars: int, *refs: Ref
) -> None:
    scalars, (q_ref, *rest) = refs[:num_scalars], refs[num_scalars:]
    parts = structure.num_leaves
    cache, rest = rest[:parts], rest[parts:]
    out_ref, *rest = rest
    softmax, (cursor, arrived, *rings) = Softmax(*rest[:4]), rest[4:]
    q_start = scalars[0]
    row, batch = pl.program_id(1), pl.num_programs(1)
    heads = pl.ds(pl.program_id(0) * tiles.heads, tiles.heads)

    def length(row: Array) -> Array:
        return q_start[row] + tiles.queries

    def blocks(row: Array) -> Array:
        return pl.cdiv(length(row), tiles.block)

    def fetch_of(row: Array, block: Array, buffer: Array) -> Fetch:
        parts = [
            (part, ring.at[buffer], arrived.at[n, buffer])
            for n, (part, ring) in enumerate(zip(cache, rings, strict=True))
        ]
        return Fetch(row, block, length(row), heads, parts)

    def following(buffer: Array) -> Array:
        return jnp.where(buffer + 1 == _DEPTH, 0, buffer + 1)

    # Row, block and buffer of the next fetch; buffer of the next block to use.
    fetch_row, fetch_block, fetch_buffer, use_buffer = range(4)

    def fetch(*_: object) -> None:
        at, block = cursor[fetch_row], cursor[fetch_block]
        buffer = cursor[fetch_buffer]

        @pl.when(at < batch)
        def start() -> None:
            source.start(scalars, fetch_of(at, block, buffer))
            ended = block + 1 >= blocks(at)
            cursor[fetch_row] = jnp.where(ended, at + 1, at)
            cursor[fetch_block] = jnp.where(ended, 0, block + 1)
            cursor[fetch_buffer] = following(buffer)

    @pl.when(row == 0)
    def fetch_first() -> None:
        for n in range(4):
            cursor[n] = 0
        jax.lax.fori_loop(0, _DEPTH - 1, fetch, None)

    def use(block: Array, _: None) -> None:
        buffer = cursor[use_buffer]
        cursor[use_buffer] = following(buffer)
        fetch()
        source.wait(scalars, fetch_of(row, block, buffer))
        k, v = structure.unflatten([ring.at[buffer] for ring in rings])
        # Where blocks overlap, slots of the one before are masked.
        first = source.first(block)
        seen = Seen(first, block * tiles.block - first, length(row) - first)
        if not isinstance(v, QuantizedSlots):  # int8 values are always finite

            @pl.when(block + 1 == blocks(row))
            def clear_rest() -> None:
                clear(tiles, v, seen.valid)

        attend(tiles, q_ref, k, v, softmax, seen)

    begin(tiles, softmax, q_start[row])
    jax.lax.fori_loop(0, blocks(row), use, None)
    finish(softmax, out_ref)
