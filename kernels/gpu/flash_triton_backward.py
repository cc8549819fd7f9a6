"""The backward pass of `flash_triton`.

Two kernels, both of which recompute the weights P from q, k and the log-sum-exp:

    for queries, grid (T / block_q, N, B)     loops over the slots that they see
        registers      dq [block_q, H]; q, the gradient of the output, P, dS
    for slots,   grid (S / block_kv, K, B)    loops over the group's N / K heads and
        registers      dk, dv [block_kv, H]   the queries that see them; k, v, P, dS
    shared memory      the current block of the loop
    HBM                all arrays in place; Δ = Σ_H out · d(out), by XLA

Every sum is computed by one program, in a fixed order: no atomic additions, so results
are deterministic. The heads of a group are summed in registers, so that dk and dv never
exist per query head.

Equations: Dao, FlashAttention-2 (arXiv:2307.08691), algorithm 2.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from llama_jax.kernels.differentiable import output_dot_gradient
from llama_jax.kernels.gpu.triton_tiles import (
    LOG2_E,
    Edges,
    Sizes,
    Tiles,
    compiler_params,
    fold_slots,
    load_rows,
    load_vector,
    query_block,
    row_inputs,
    scores,
    whole,
)
from llama_jax.kernels.precision import product
from llama_jax.kernels.refs import Ref, Scalar


def backward(
    tiles: Tiles,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
    out: Array,
    lse: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    """Compute the gradients of q, k and v.

    Args:
      tiles: tile sizes.
      interpret: run in interpret mode, on any device.
      q: queries, `[B, T, N, H]`.
      k: keys, `[B, K, S, H]`.
      v: values, `[B, K, S, H]`.
      q_start: slot of each row's first query, or None.
      segment_ids: segments of packed rows, or None.
      out: output of any forward pass, `[B, T, N, H]`.
      lse: log-sum-exp of each query's scores, `[B, N, T]`.
      d_out: gradient of the output.
    """
    batch, queries, heads, width = q.shape
    groups, slots = k.shape[1:3]
    group = heads // groups
    wide = pl.next_power_of_2(width)
    delta = output_dot_gradient(out, d_out).swapaxes(1, 2)  # B N T, like lse
    rows, row_specs = row_inputs(q_start, segment_ids, tiles)
    call = functools.partial(
        pl.pallas_call, compiler_params=compiler_params(tiles), interpret=interpret
    )
    sizes = Sizes(queries, slots, width)
    operands = (*rows, q, k, v, d_out, lse, delta)

    blocks = pl.cdiv(queries, tiles.q)
    queries_spec = pl.BlockSpec(
        (None, tiles.q, None, wide), lambda i, n, b: (b, blocks - 1 - i, n, 0)
    )
    slots_spec = pl.BlockSpec(
        (None, None, whole(slots, tiles.kv), wide),
        lambda i, n, b: (b, jax.lax.div(n, group), 0, 0),
    )
    numbers_spec = pl.BlockSpec(
        (None, None, tiles.q), lambda i, n, b: (b, n, blocks - 1 - i)
    )
    dq = call(
        functools.partial(_queries_kernel, tiles=tiles, sizes=sizes),
        grid=(blocks, heads, batch),
        in_specs=[
            *row_specs,
            *(queries_spec, slots_spec, slots_spec, queries_spec),
            *(numbers_spec, numbers_spec),
        ],
        out_specs=queries_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="flash_attention_gradient_of_queries",
    )(*operands)

    all_rows = whole(queries, tiles.q)
    group_spec = pl.BlockSpec(
        (None, all_rows, group, wide), lambda i, g, b: (b, 0, g, 0)
    )
    numbers_spec = pl.BlockSpec((None, group, all_rows), lambda i, g, b: (b, g, 0))
    slots_spec = pl.BlockSpec(
        (None, None, tiles.kv, wide), lambda i, g, b: (b, g, i, 0)
    )
    dk, dv = call(
        functools.partial(_slots_kernel, tiles=tiles, sizes=sizes),
        grid=(pl.cdiv(slots, tiles.kv), groups, batch),
        in_specs=[
            *row_specs,
            *(group_spec, slots_spec, slots_spec, group_spec),
            *(numbers_spec, numbers_spec),
        ],
        out_specs=[slots_spec, slots_spec],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        name="flash_attention_gradient_of_slots",
    )(*operands)
    return dq, dk, dv


def _queries_kernel(
    start_ref: Ref | None,
    ids_ref: Ref | None,
    edge_refs: Edges | None,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    dq_ref: Ref,
    *,
    tiles: Tiles,
    sizes: Sizes,
) -> None:
    block = query_block(start_ref, ids_ref, q_ref, tiles, sizes)
    d_out = plgpu.load(d_out_ref, mask=block.inside, other=0).astype(q_ref.dtype)
    valid = block.row < sizes.queries
    lse = plgpu.load(lse_ref, mask=valid, other=0) * LOG2_E
    delta = plgpu.load(delta_ref, mask=valid, other=0)

    def step(s: Array, k: Array, v: Array, dq: Array) -> Array:
        p = jnp.exp2(s - lse[:, None])
        ds = p * (product(d_out, v, 1, 1) - delta[:, None])
        return dq + product(ds.astype(k.dtype), k, 1, 0)

    dq = jnp.zeros(q_ref.shape, jnp.float32)
    slots = ids_ref, edge_refs, k_ref, v_ref
    dq = fold_slots(step, dq, block, *slots, tiles, sizes)
    dq *= sizes.width**-0.5
    plgpu.store(dq_ref, dq.astype(dq_ref.dtype), mask=block.inside)


def _slots_kernel(
    start_ref: Ref | None,
    ids_ref: Ref | None,
    edge_refs: Edges | None,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    d_out_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    dk_ref: Ref,
    dv_ref: Ref,
    *,
    tiles: Tiles,
    sizes: Sizes,
) -> None:
    queries, slots, width = sizes
    block = pl.program_id(0)
    group, wide = q_ref.shape[-2:]
    dtype = q_ref.dtype
    slot = block * tiles.kv + jnp.arange(tiles.kv)
    columns = (jnp.arange(wide) < width)[None]
    start = 0 if start_ref is None else start_ref[()]
    limit = jnp.minimum(start + queries, slots)
    seen = (slot < limit)[:, None] & columns
    k = plgpu.load(k_ref, mask=seen, other=0).astype(dtype)
    v = plgpu.load(v_ref, mask=seen, other=0).astype(dtype)
    ids = None
    if ids_ref is not None:
        ids = load_vector(ids_ref, block * tiles.kv, tiles.kv, queries)

    def step(
        masked: bool, head: Array, at: Array, sums: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        dk, dv = sums
        first = at * tiles.q
        rows = first, tiles.q, queries
        q = load_rows(q_ref, *rows, width, dtype, head)
        d_out = load_rows(d_out_ref, *rows, width, dtype, head)
        lse = load_vector(lse_ref, *rows, head) * LOG2_E
        delta = load_vector(delta_ref, *rows, head)
        s = scores(q, k, width)
        if masked:
            row = first + jnp.arange(tiles.q)
            mask = slot[None, :] <= (start + row)[:, None]
            if ids is not None and ids_ref is not None:
                row_ids = load_vector(ids_ref, first, tiles.q, queries)
                mask &= row_ids[:, None] == ids[None, :]
            s = jnp.where(mask, s, -jnp.inf)
        # After the last query q, its gradient and Δ are zeros, and add nothing.
        p = jnp.exp2(s - lse[:, None])
        dv += product(p.astype(dtype), d_out, 0, 0)
        ds = p * (product(d_out, v, 1, 1) - delta[:, None])
        return dk + product(ds.astype(dtype), q, 0, 0), dv

    end: Scalar = pl.cdiv(queries, tiles.q)
    first = jnp.maximum(block * tiles.kv - start, 0) // tiles.q
    if edge_refs is None:
        # From here on every query sees the whole block.
        full = jnp.maximum((block + 1) * tiles.kv - 1 - start, 0)
        full = jnp.minimum(pl.cdiv(full, tiles.q), end)
    else:
        full = end = edge_refs.last_q[block]

    def add_head(head: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        masked = functools.partial(step, True, head)
        sums = jax.lax.fori_loop(first, full, masked, sums)
        if edge_refs is None:
            unmasked = functools.partial(step, False, head)
            sums = jax.lax.fori_loop(jnp.maximum(first, full), end, unmasked, sums)
        return sums

    zeros = jnp.zeros((tiles.kv, wide), jnp.float32)
    dk, dv = jax.lax.fori_loop(0, group, add_head, (zeros, zeros))
    inside = (slot < slots)[:, None] & columns
    dk *= width**-0.5
    plgpu.store(dk_ref, dk.astype(dk_ref.dtype), mask=inside)
    plgpu.store(dv_ref, dv.astype(dv_ref.dtype), mask=inside)
