"""The backward pass of flash attention for TPUs, all three gradients in one kernel.

Scores are recomputed, tile by tile, from q, k and log Σ exp(scores). Tiles are
transposed, slots by queries, so that a value per query is a row of lanes:

    p  = exp(k·qᵀ - lse)          dv += p·do
    dp = v·doᵀ                    dk += ds·q        five products per tile; one kernel
    ds = p·(dp - Σ o·do)          dq += dsᵀ·k       for each side would need seven

For one key/value head the grid visits the query heads of its group, their blocks of
queries, and the blocks of slots that these see. Memory:

* VMEM: dk and dv of all slots (`[S, H]` float32 each) until the group is done, so that
  nothing is accumulated in HBM and no head is repeated; dq of the block of queries.
* HBM: everything else, copied block by block ahead of its use.

S is bounded by VMEM. A longer cache is processed in chunks, one kernel per chunk, with
`q_start` relative to the chunk (negative for queries before it).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, Float, Int

from llama_jax.kernels.precision import product
from llama_jax.kernels.refs import Ref, Scalar
from llama_jax.kernels.tpu.flash_tiles import (
    LANES,
    LOG2_E,
    Block,
    Tiles,
    across,
    grid_step,
    is_last_of_block,
    segment_operands,
    tile_list,
    walk,
    window_read,
)

Grads = tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]


def _backward_kernel(
    *arguments: Ref, tiles: Tiles, scale: float, slots: int, packed: bool
) -> None:
    refs: Sequence[Ref]
    scalars, refs = arguments[:3], arguments[3:]
    bounds = refs[: 2 * packed]
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs = refs[2 * packed :]
    q_ids, kv_ids = refs[:2] if packed else (None, None)
    dq_ref, dk_out, dv_out, acc_ref, dk_ref, dv_ref, copies = refs[2 * packed :]
    row, kv_head, head, step = (pl.program_id(axis) for axis in range(4))
    heads, steps = pl.num_programs(2), pl.num_programs(3)
    width = q_ref.shape[3]
    grid = grid_step(scalars, bounds, step, tiles, slots)

    def attend(at: Scalar, size: int, at_kv: Scalar, masked: bool) -> None:
        """Add the gradients of some queries and a block of slots."""
        rows, block = pl.ds(at, size), pl.ds(at_kv, tiles.kv)
        sums = pl.ds(pl.multiple_of(grid.first_kv + at_kv, tiles.kv), tiles.kv)
        q, do = q_ref[0, 0, rows], do_ref[0, 0, rows]
        k, v = k_ref[0, 0, block], v_ref[0, 0, block]
        lse, delta = lse_ref[0, 0, :, rows], delta_ref[0, 0, :, rows]
        scores = product(k, q, 1, 1) * (scale * LOG2_E)
        p = jnp.exp2(scores - lse)
        if masked:
            kv_slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            q_slot = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            first = grid.first_kv + at_kv
            seen = kv_slot - q_slot <= grid.first_q + at - first
            if q_ids is not None and kv_ids is not None:
                seen &= across(kv_ids[0, :, block]) == q_ids[0, :, rows]
            if slots % tiles.window:
                # Scores of the padding are 0, which lse does not bound.
                seen &= kv_slot < slots - first
            p = jnp.where(seen, p, 0.0)
        ds = (p * (product(v, do, 1, 1) - delta)).astype(q.dtype)
        dv_ref[sums, :width] += product(p.astype(do.dtype), do, 1, 0)
        dk_ref[sums, :width] += product(ds, q, 1, 0)
        acc_ref[rows] += product(ds, k, 0, 0)

    @pl.when((head == 0) & (step == 0))
    def begin_group() -> None:
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    def begin() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    pl.when(step == 0)(begin)

    walk(tiles, grid, attend)

    @pl.when(is_last_of_block(scalars[1], step, steps))
    def finish() -> None:
        dq_ref[0, 0] = (acc_ref[...] * scale).astype(dq_ref.dtype)
        begin()  # for the next block of queries

    @pl.when((head == heads - 1) & (step == steps - 1))
    def finish_group() -> None:
        whole_heads = [
            pltpu.make_async_copy(ref, out.at[row, kv_head], copies.at[n])
            for n, (ref, out) in enumerate(((dk_ref, dk_out), (dv_ref, dv_out)))
        ]
        for copy in whole_heads:
            copy.start()
        for copy in whole_heads:
            copy.wait()


def flash_backward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    q_start: Int[Array, " B"] | None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    do: Float[Array, "B N T H"],
    *,
    tiles: Tiles,
    chunk: int,
    dq_dtype: DTypeLike = jnp.float32,
    interpret: bool = False,
) -> Grads:
    """Compute the gradients of q, k and v.

    Args:
      q: queries.
      k: keys.
      v: values.
      q_start: slot of each row's first query; may be negative. Defaults to 0.
      segment_ids: segments of queries and of slots.
      lse: log Σ exp(scores) of each query.
      delta: Σ_H o·do of each query.
      do: gradient of the output.
      tiles: tile sizes.
      chunk: number of slots whose gradients VMEM holds at once.
      dq_dtype: dtype of the gradient of q, which is accumulated in float32.
      interpret: run in interpret mode, on any device.

    Returns:
      The gradient of q, and those of k and v in float32.
    """
    queries, slots = q.shape[2], k.shape[2]
    tiles = tiles.within(queries, slots)
    more_q, more_kv = -queries % tiles.q, -slots % tiles.window
    # Padding of the queries adds nothing; that of k and v is masked.
    q, do = (_padded(x, more_q, 2) for x in (q, do))
    k, v = (_padded(x, more_kv, 2) for x in (k, v))
    lse, delta = (_padded(x, more_q, 2) for x in (lse, delta))
    q_ids, kv_ids = segment_ids or (None, None)
    if q_ids is not None and kv_ids is not None:
        q_ids, kv_ids = (
            _padded(q_ids, more_q, 1, "edge"),
            _padded(kv_ids, more_kv, 1, "edge"),
        )
    chunk = max(chunk // tiles.window, 1) * tiles.window
    run = functools.partial(
        _chunk_backward,
        tiles=tiles,
        dq_dtype=dq_dtype if chunk >= slots + more_kv else jnp.float32,
        interpret=interpret,
    )
    dqs, dks, dvs = [], [], []
    for first in range(0, slots + more_kv, chunk):
        part = slice(first, first + chunk)
        start = q_start
        if first:
            start = (0 if q_start is None else q_start) - jnp.full(
                (q.shape[0],), first, jnp.int32
            )
        ids = None if kv_ids is None else (q_ids, kv_ids[:, part])
        # A loop under vmap: Pallas cannot batch arrays that a kernel copies itself.
        run_chunk = jax.custom_batching.sequential_vmap(
            functools.partial(run, first=first, slots=min(chunk, slots - first))
        )
        dq, dk, dv = run_chunk(
            q, k[:, :, part], v[:, :, part], start, ids, lse, delta, do
        )
        dqs.append(dq)
        dks.append(dk)
        dvs.append(dv)
    dq = functools.reduce(jnp.add, dqs)
    dk, dv = (
        jnp.concatenate(x, axis=2)[:, :, :slots, : q.shape[3]] for x in (dks, dvs)
    )
    # XLA fuses the scale of dk with its cast; the kernel would need another pass.
    return dq[:, :, :queries].astype(dq_dtype), dk * q.shape[3] ** -0.5, dv


def _padded(x: Array, more: int, axis: int, mode: str = "constant") -> Array:
    if not more:
        return x
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, more)
    return jnp.pad(x, pad, mode=mode)


def _chunk_backward(
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    ids: tuple[Array, Array] | None,
    lse: Array,
    delta: Array,
    do: Array,
    *,
    first: int,
    slots: int,
    tiles: Tiles,
    dq_dtype: DTypeLike,
    interpret: bool,
) -> Sequence[Array]:
    """Gradients by the slots of `k` and `v`, accumulated in VMEM.

    The first `slots` of them are real, the rest is padding.
    """
    batch, heads, queries, width = q.shape
    kv_heads, padded = k.shape[1:3]
    lanes = -(-width // LANES) * LANES  # older compilers only copy whole registers
    group = heads // kv_heads
    q_of, kv_of = tile_list(queries, padded, tiles, causal=q_start is None)
    start = jnp.zeros((batch,), jnp.int32) if q_start is None else q_start

    def q_block(b: Array, n: Array, g: Array, step: Array, *scalars: Ref) -> Block:
        return b, n * group + g, scalars[1][step], 0

    def row_block(b: Array, n: Array, g: Array, step: Array, *scalars: Ref) -> Block:
        return b, n * group + g, 0, scalars[1][step]

    window = functools.partial(window_read, tiles, padded)

    def kv_block(b: Array, n: Array, g: Array, step: Array, *scalars: Ref) -> Block:
        return b, n, window(b, step, *scalars), 0

    scalars = [start.astype(jnp.int32), q_of, kv_of]
    arrays = [q, k, v, do, lse[:, :, None] * LOG2_E, delta[:, :, None]]
    q_spec = pl.BlockSpec((1, 1, tiles.q, width), q_block)
    kv_spec = pl.BlockSpec((1, 1, tiles.window, width), kv_block)
    row_spec = pl.BlockSpec((1, 1, 1, tiles.q), row_block)
    specs = [q_spec, kv_spec, kv_spec, q_spec, row_spec, row_spec]
    bounds, id_arrays, id_specs = segment_operands(ids, tiles, q_block, kv_block)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            _backward_kernel,
            tiles=tiles,
            scale=width**-0.5,
            slots=slots,
            packed=ids is not None,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars) + len(bounds),
            grid=(batch, kv_heads, group, len(q_of)),
            in_specs=[*specs, *id_specs],
            out_specs=[q_spec, in_hbm, in_hbm],
            scratch_shapes=[
                pltpu.VMEM((tiles.q, width), jnp.float32),
                pltpu.VMEM((padded, lanes), jnp.float32),
                pltpu.VMEM((padded, lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dq_dtype),
            jax.ShapeDtypeStruct((*k.shape[:3], lanes), jnp.float32),
            jax.ShapeDtypeStruct((*v.shape[:3], lanes), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=64 << 20,
        ),
        name=f"flash_backward_{first}" if first else "flash_backward",
        interpret=interpret,
    )(*scalars, *bounds, *arrays, *id_arrays)
