"""Flash attention for NVIDIA GPUs from Ampere on: Pallas, lowered to Triton.

    grid (T / block_q, N, B): a program computes a block of queries of one head

           slots →   block_kv
        ┌────────┬────────┬────────┬────────┐
      q │  full  │  full  │ masked │  ────  │   blocks after the last query are not
        └────────┴────────┴────────┴────────┘   read; only those that cross the
                                                diagonal are masked
    registers     a block of queries, and their weighted sum of values [block_q, H],
                  largest score and sum of weights, all float32
    shared memory a block of keys and one of values, prefetched by Triton
    HBM           q, k, v in place; the output and each query's log-sum-exp

Head n reads the keys of head n // (N / K) in place: nothing is repeated. Triton needs
powers of two, so heads of 80 and 96 become 128 by masked loads, and so do the last
blocks of queries and slots; no array is padded. Packed rows begin at the first block in
which one of their segments begins. Programs with the most blocks start first.

Tile sizes follow from shared memory and registers; no device has timed them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels.differentiable import differentiable
from llama_jax.kernels.gpu import flash_triton_backward
from llama_jax.kernels.gpu.triton_tiles import (
    LOG2_E,
    Edges,
    OnlineSoftmax,
    Sizes,
    Tiles,
    compiler_params,
    fold_slots,
    query_block,
    row_inputs,
    whole,
)
from llama_jax.kernels.refs import Ref


class Blocks(NamedTuple):
    """Tile sizes of the forward and the backward pass."""

    forward: Tiles
    backward: Tiles


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute `kernels.attention` on a GPU, differentiable, without scores in memory.

    The backward pass recomputes the weights from the log-sum-exp of each query, and is
    deterministic. Slots after the last query of a row are not read.

    Args:
      q: queries.
      k: keys, cast to q's dtype block by block.
      v: values, like `k`.
      q_start: slot of each row's first query; defaults to 0.
      segment_ids: segments of packed rows (S = T), which need not be contiguous.
      block_q: queries of a program, a power of two ≥ 16; has a default.
      block_kv: slots of a step, a power of two ≥ 16; has a default.
      interpret: run in interpret mode, on any device.

    Raises:
      ValueError: shapes that do not match, heads wider than 256, or blocks that are no
        power of two.
    """
    check(q, k, v, segment_ids)
    blocks = blocks_for(q, k.shape[2], block_q, block_kv)
    return _attend((blocks, interpret), q, k, v, q_start, segment_ids)


def check(q: Array, k: Array, v: Array, segment_ids: Array | None) -> None:
    """Check that the shapes are those of flash attention.

    Raises:
      ValueError: they are not.
    """
    batch, queries, heads, width = q.shape
    groups, slots = k.shape[1:3]
    if k.shape != (batch, groups, slots, width) or v.shape != k.shape:
        raise ValueError(
            f"keys {k.shape} and values {v.shape} do not match queries {q.shape}"
        )
    if heads % groups:
        raise ValueError(
            f"the number of query heads, {heads}, must be a multiple of that of "
            f"key/value heads, {groups}"
        )
    if width > 256:
        raise ValueError(f"head_dim must be at most 256, got {width}")
    if segment_ids is not None and slots != queries:
        raise ValueError(
            f"packed rows attend to themselves, but there are {slots} slots for "
            f"{queries} queries; leave out segment_ids with a cache"
        )


def blocks_for(
    q: Array, slots: int, block_q: int | None = None, block_kv: int | None = None
) -> Blocks:
    """The given tile sizes, or what fits 99 kB of shared memory with a prefetch."""
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size is not None and (size < 16 or size & (size - 1)):
            raise ValueError(f"{name} must be a power of two, at least 16, got {size}")
    wide = pl.next_power_of_2(q.shape[3]) > 64
    divisor = (1 + (q.dtype == jnp.float32)) * (1 + (q.shape[3] > 128))
    whole_q, whole_kv = (
        max(16, pl.next_power_of_2(size)) for size in (q.shape[1], slots)
    )

    def tiles(rows: int, columns: int, warps: int) -> Tiles:
        return Tiles(
            q=block_q or min(whole_q, rows // divisor),
            kv=block_kv or min(whole_kv, columns // divisor),
            warps=warps,
            stages=2,
        )

    return Blocks(tiles(128, 64, 8 if wide else 4), tiles(64, 64, 8 if wide else 4))


def _forward(
    settings: tuple[Blocks, bool],
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    tiles, interpret = settings[0].forward, settings[1]
    batch, queries, heads, width = q.shape
    slots, group = k.shape[2], heads // k.shape[1]
    blocks = pl.cdiv(queries, tiles.q)
    wide = pl.next_power_of_2(width)
    queries_spec = pl.BlockSpec(
        (None, tiles.q, None, wide), lambda i, n, b: (b, blocks - 1 - i, n, 0)
    )
    slots_spec = pl.BlockSpec(
        (None, None, whole(slots, tiles.kv), wide),
        lambda i, n, b: (b, jax.lax.div(n, group), 0, 0),
    )
    rows, row_specs = row_inputs(q_start, segment_ids, tiles)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, sizes=Sizes(queries, slots, width)),
        grid=(blocks, heads, batch),
        in_specs=[*row_specs, queries_spec, slots_spec, slots_spec],
        out_specs=[
            queries_spec,
            pl.BlockSpec((None, None, tiles.q), lambda i, n, b: (b, n, blocks - 1 - i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
        ],
        compiler_params=compiler_params(tiles),
        interpret=interpret,
        name="flash_attention",
    )(*rows, q, k, v)
    return out, lse


def _kernel(
    start_ref: Ref | None,
    ids_ref: Ref | None,
    edge_refs: Edges | None,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    lse_ref: Ref,
    *,
    tiles: Tiles,
    sizes: Sizes,
) -> None:
    block = query_block(start_ref, ids_ref, q_ref, tiles, sizes)

    def step(s: Array, k: Array, v: Array, softmax: OnlineSoftmax) -> OnlineSoftmax:
        return softmax.add(s, v)

    softmax = OnlineSoftmax.empty(*q_ref.shape)
    slots = ids_ref, edge_refs, k_ref, v_ref
    softmax = fold_slots(step, softmax, block, *slots, tiles, sizes)
    out = (softmax.total / softmax.weight[:, None]).astype(out_ref.dtype)
    plgpu.store(out_ref, out, mask=block.inside)
    natural = (softmax.largest + jnp.log2(softmax.weight)) / LOG2_E
    plgpu.store(lse_ref, natural, mask=block.row < sizes.queries)


def _backward(
    settings: tuple[Blocks, bool], *residuals: Any
) -> tuple[Array, Array, Array]:
    blocks, interpret = settings
    return flash_triton_backward.backward(blocks.backward, interpret, *residuals)


_attend = differentiable(_forward, _backward)
