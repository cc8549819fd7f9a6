"""The library's own attention kernels for TPUs."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import PyTreeDef

from llama_jax.bench.attention_work import (
    Call,
    Candidate,
    Work,
    causal_shapes,
    page_table,
    with_gradient,
)
from llama_jax.kernels import QuantizedSlots
from llama_jax.kernels.tpu.decode import decode_attention
from llama_jax.kernels.tpu.flash import Blocks, flash_attention
from llama_jax.kernels.tpu.flash_tiles import Tiles
from llama_jax.kernels.tpu.paged import paged_attention
from llama_jax.types import Array, PyTree

_SWEEP = (
    (512, 512),
    (512, 1024),
    (1024, 512),
    (1024, 1024),
    (2048, 512),
    (2048, 1024),
)


def our_kernels(work: Work, *, sweep: bool) -> Iterator[Candidate]:
    """Our kernels for the work, at their default tiles or also at those of a sweep."""
    if work.kind == "decode":
        yield Candidate("llama_jax", "cache", functools.partial(_decode, work))
        pages = f"pages of {work.page}"
        yield Candidate("llama_jax paged", pages, functools.partial(_paged, work))
        return
    yield Candidate("llama_jax", "default", functools.partial(_flash, work, None))
    for tile in _SWEEP if sweep else ():
        name = f"{tile[0]}x{tile[1]}"
        yield Candidate("llama_jax", name, functools.partial(_flash, work, tile))


def _flash(work: Work, tile: tuple[int, int] | None) -> Call:
    tiles = None if tile is None else Tiles(*tile)
    blocks = None if tiles is None else Blocks(forward=tiles, backward=tiles)

    def attend(q: Array, k: Array, v: Array) -> Array:
        out = flash_attention(q.swapaxes(1, 2), k, v, blocks=blocks)
        return out.swapaxes(1, 2)

    return Call(with_gradient(work, attend), causal_shapes(work))


def _decode(work: Work) -> Call:
    slots, structure = _slots(work, work.rows, work.length)

    def attend(q: Array, q_start: Array, *slots: Array) -> Array:
        k, v = structure.unflatten(slots)
        return decode_attention(q, k, v, q_start=q_start)

    return Call(attend, [_queries(work), _last_slots(work), *slots])


def _paged(work: Work) -> Call:
    count, table = page_table(work)
    slots, structure = _slots(work, count, work.page)

    def attend(q: Array, q_start: Array, table: Array, *slots: Array) -> Array:
        k, v = structure.unflatten(slots)
        return paged_attention(q, k, v, table, q_start=q_start)

    return Call(attend, [_queries(work), _last_slots(work), table, *slots])


def _queries(work: Work) -> jax.ShapeDtypeStruct:
    heads = work.heads
    return jax.ShapeDtypeStruct((work.rows, 1, heads.n, heads.h), jnp.bfloat16)


def _slots(
    work: Work, rows: int, slots: int
) -> tuple[list[jax.ShapeDtypeStruct], PyTreeDef]:
    """Keys and values of a cache or of pages: flat shapes, and their tree structure."""
    shape = (rows, work.heads.k, slots, work.heads.h)
    keys: PyTree = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if work.int8:
        values: PyTree = jax.ShapeDtypeStruct(shape, jnp.int8)
        scales: PyTree = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
        keys = QuantizedSlots(values, scales)
    return jax.tree.flatten((keys, keys))


def _last_slots(work: Work) -> np.ndarray:
    """Each row's query is at its last slot."""
    return np.full(work.rows, work.length - 1, np.int32)
