"""Tiles of the Triton kernels: loads, masks, and the loop over a query's slots."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, DTypeLike, Int

from llama_jax.kernels.precision import product
from llama_jax.kernels.refs import Ref, Scalar

LOG2_E = math.log2(math.e)
LEAST = -1e30  # below any score, and finite, so that differences are never NaN

Carry = TypeVar("Carry")


class Tiles(NamedTuple):
    """Queries and slots of a block, and Triton's warps and pipeline stages."""

    q: int
    kv: int
    warps: int
    stages: int


class Sizes(NamedTuple):
    """T, S and H."""

    queries: int
    slots: int
    width: int


class Edges(NamedTuple):
    """Where segments of packed rows allow a loop over blocks to begin or end."""

    first_kv: Int[Array, "B Q"]  # per block of queries, the first block of slots
    last_q: Int[Array, "B C"]  # per block of slots, the end of the blocks of queries


def edges(segment_ids: Int[Array, "B T"], tiles: Tiles) -> Edges:
    """Blocks outside of which no segment is shared; segments need not be contiguous."""
    first = jax.vmap(_first_of_segment)(segment_ids)
    last = segment_ids.shape[1] - jax.vmap(_first_of_segment)(segment_ids[:, ::-1])
    return Edges(
        first_kv=_by_block(first, tiles.q, jnp.min, segment_ids.shape[1]) // tiles.kv,
        last_q=pl.cdiv(_by_block(last[:, ::-1], tiles.kv, jnp.max, 0), tiles.q),
    )


def _first_of_segment(ids: Array) -> Array:
    """The index of the first token of each token's segment."""
    order = jnp.argsort(ids, stable=True)
    index = jnp.arange(ids.size)
    new = jnp.concatenate([jnp.array([True]), jnp.diff(ids[order]) != 0])
    start = jax.lax.cummax(jnp.where(new, index, 0))
    return jnp.zeros_like(index).at[order].set(order[start])


def _by_block(
    per_token: Array, size: int, reduce: Callable[..., Array], neutral: int
) -> Array:
    batch, length = per_token.shape
    pad = ((0, 0), (0, -length % size))
    padded = jnp.pad(per_token, pad, constant_values=neutral)
    return reduce(padded.reshape(batch, -1, size), axis=2).astype(jnp.int32)


def whole(size: int, block: int) -> int:
    """`size` rounded up to whole blocks."""
    return pl.cdiv(size, block) * block


def row_spec(
    array: Array | None, size: int | None = None, *, row: Callable[..., Array]
) -> pl.BlockSpec | None:
    """One row's scalar, or the first `size` numbers of one row; None for None."""
    if array is None:
        return None
    if size is None:
        return pl.BlockSpec((None,), lambda *ids: (row(*ids),))
    return pl.BlockSpec((None, size), lambda *ids: (row(*ids), 0))


def row_inputs(
    q_start: Array | None, segment_ids: Array | None, tiles: Tiles
) -> tuple[list[Array | Edges | None], list[pl.BlockSpec | Edges | None]]:
    """`q_start`, segment ids and edges of a grid whose last axis is B, with specs."""
    limits = None if segment_ids is None else edges(segment_ids, tiles)
    spec = functools.partial(row_spec, row=lambda i, n, b: b)
    size = 0 if segment_ids is None else segment_ids.shape[1]
    specs = [
        spec(q_start),
        spec(segment_ids, whole(size, max(tiles.q, tiles.kv))),
        jax.tree.map(lambda edge: spec(edge, edge.shape[1]), limits),
    ]
    return [q_start, segment_ids, limits], specs


def compiler_params(tiles: Tiles) -> plgpu.CompilerParams:
    """The settings of Triton's compiler."""
    return plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)


def scores(q: Array, k: Array, width: int) -> Array:
    """Scores in units of log 2, for `exp2`."""
    return product(q, k, 1, 1) * (LOG2_E * width**-0.5)


def load_rows(
    ref: Ref,
    first: Scalar,
    size: int,
    limit: Scalar,
    width: int,
    dtype: DTypeLike,
    *head: Array,
) -> Array:
    """Load rows from `first` on; zeros from row `limit` and column `width` on."""
    mask = (first + jnp.arange(size) < limit)[:, None] & _columns(ref, width)
    at = ref.at[(pl.ds(first, size), *head, slice(None))]
    return plgpu.load(at, mask=mask, other=0).astype(dtype)


def load_vector(
    ref: Ref, first: Scalar, size: int, limit: Scalar, *head: Array
) -> Array:
    """Load a number per row; zeros from `limit` on."""
    mask = first + jnp.arange(size) < limit
    return plgpu.load(ref.at[(*head, pl.ds(first, size))], mask=mask, other=0)


def _columns(ref: Ref, width: int) -> Array:
    return (jnp.arange(ref.shape[-1]) < width)[None]


class QueryBlock(NamedTuple):
    """A program's block of queries.

    Attributes:
      first: index of its first query.
      row: index of every query.
      inside: which rows and columns of the block are inside the array.
      q: the queries.
      start: slot of query 0.
      limit: number of slots that the row attends to.
      ids: segment of every query, or None.
    """

    first: Array
    row: Array
    inside: Array
    q: Array
    start: Array | int
    limit: Array
    ids: Array | None


def query_block(
    start_ref: Ref | None, ids_ref: Ref | None, q_ref: Ref, tiles: Tiles, sizes: Sizes
) -> QueryBlock:
    """Load a block of queries; blocks are in reverse order, the longest first."""
    first = (pl.num_programs(0) - 1 - pl.program_id(0)) * tiles.q
    row = first + jnp.arange(tiles.q)
    inside = (row < sizes.queries)[:, None] & _columns(q_ref, sizes.width)
    start = 0 if start_ref is None else start_ref[()]
    return QueryBlock(
        first=first,
        row=row,
        inside=inside,
        q=plgpu.load(q_ref, mask=inside, other=0),
        start=start,
        limit=jnp.minimum(start + sizes.queries, sizes.slots),
        ids=None
        if ids_ref is None
        else load_vector(ids_ref, first, tiles.q, sizes.queries),
    )


def fold_slots(
    step: Callable[[Array, Array, Array, Carry], Carry],
    carry: Carry,
    block: QueryBlock,
    ids_ref: Ref | None,
    edge_refs: Edges | None,
    k_ref: Ref,
    v_ref: Ref,
    tiles: Tiles,
    sizes: Sizes,
) -> Carry:
    """Fold `step(scores, k, v, carry)` over the blocks of slots that queries see."""

    def masked_step(masked: bool, at: Array, carry: Carry) -> Carry:
        first = at * tiles.kv
        shape = first, tiles.kv, block.limit, sizes.width, block.q.dtype
        k, v = load_rows(k_ref, *shape), load_rows(v_ref, *shape)
        s = scores(block.q, k, sizes.width)
        if masked:
            slot = first + jnp.arange(tiles.kv)
            mask = slot[None, :] <= (block.start + block.row)[:, None]
            if block.ids is not None and ids_ref is not None:
                slot_ids = load_vector(ids_ref, first, tiles.kv, sizes.queries)
                mask &= block.ids[:, None] == slot_ids[None, :]
            s = jnp.where(mask, s, -jnp.inf)
        return step(s, k, v, carry)

    last = jnp.minimum(block.first + tiles.q, sizes.queries) + block.start
    end = pl.cdiv(jnp.minimum(last, sizes.slots), tiles.kv)
    if edge_refs is None:
        # The first query sees all of these blocks: no mask.
        full = jnp.minimum((block.start + block.first + 1) // tiles.kv, end)
        unmasked = functools.partial(masked_step, False)
        carry = jax.lax.fori_loop(0, full, unmasked, carry)
    else:
        full = edge_refs.first_kv[pl.num_programs(0) - 1 - pl.program_id(0)]
    return jax.lax.fori_loop(full, end, functools.partial(masked_step, True), carry)


class OnlineSoftmax(NamedTuple):
    """The softmax over the slots so far, in float32.

    Attributes:
      total: weighted sum of values, `[block, H]`.
      largest: largest score of each query, in units of log 2.
      weight: sum of the weights of each query.
    """

    total: Array
    largest: Array
    weight: Array

    @classmethod
    def empty(cls, rows: int, width: int) -> "OnlineSoftmax":
        """The softmax over no slots."""
        return cls(
            jnp.zeros((rows, width), jnp.float32),
            jnp.full((rows,), LEAST, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
        )

    def add(self, s: Array, v: Array, v_scale: Array | None = None) -> "OnlineSoftmax":
        """Add a block of slots.

        Args:
          s: scores.
          v: values.
          v_scale: scales of int8 values.
        """
        largest = jnp.maximum(self.largest, jnp.max(s, axis=1))
        decay = jnp.exp2(self.largest - largest)
        p = jnp.exp2(s - largest[:, None])
        weight = self.weight * decay + jnp.sum(p, axis=1)
        if v_scale is not None:
            p *= v_scale[None, :]
        update = product(p.astype(v.dtype), v, 1, 0)
        return OnlineSoftmax(self.total * decay[:, None] + update, largest, weight)
