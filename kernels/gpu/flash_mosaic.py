"""Flash attention for Hopper: Pallas, lowered to Mosaic GPU, with its own pipeline.

    grid (N, T / (2 · block_q), B); a program is three warpgroups of 128 threads

      producer (40 registers per thread)   TMA: blocks of k and of v into a ring of
                                           `depth` buffers, as they become free
      workers 0 and 1 (232 registers)      each has block_q queries of one head:
          tensor cores  q · kᵀ   │ softmax │  + p · v  │ q · kᵀ  │ softmax ...
          worker 1        ...    │ q · kᵀ  │  softmax  │ + p · v │ ...
      one multiplies while the other takes exponentials: they synchronize every half.

    registers     the weighted sum of values [block_q, H], scores and weights [block_q,
                  block_kv], the largest score and sum of weights of each query
    shared memory q of both workers (reused for their output), the ring of k and v,
                  swizzled for wgmma
    HBM           q, k, v in place, the output, each query's log-sum-exp

Blocks after the last query of a program are not fetched, nor those before the first
slot of its segments; only blocks that cross the diagonal are masked. Head n reads the
keys of head n // (N / K). TMA reads zeros after an array's end and does not write
there: no array is padded but the log-sum-exp.

The backward pass is that of `flash_triton`, from this kernel's log-sum-exp.
Tile sizes follow from registers and shared memory; no device has timed them.

Ideas: Shah and others, FlashAttention-3 (arXiv:2407.08608), section 3.1.
"""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels import compat
from llama_jax.kernels.differentiable import differentiable
from llama_jax.kernels.gpu import flash_triton, flash_triton_backward
from llama_jax.kernels.gpu.triton_tiles import LEAST, LOG2_E, Tiles, edges, whole
from llama_jax.kernels.precision import product
from llama_jax.kernels.refs import Ref

ACCUMULATOR = plgpu.WGMMAAccumulatorRef
WORKERS = 2
PRODUCER = WORKERS

Sums: TypeAlias = tuple[Array, Array, Array]
"""Weighted values, largest score and sum of weights of each query of a worker."""


class Blocks(NamedTuple):
    """Queries of a worker, slots of a step, and number of prefetched steps."""

    q: int
    kv: int
    depth: int


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    block_q: int = 64,
    block_kv: int = 128,
    depth: int = 2,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute `kernels.attention` on Hopper (compute capability 9.0), differentiable.

    Slots after a row's last query must be finite: in a block that is partly visible
    they are multiplied by zero weights.

    Args:
      q: queries, bfloat16 or float16.
      k: keys, of the same dtype.
      v: values, of the same dtype.
      q_start: slot of each row's first query; defaults to 0.
      segment_ids: segments of packed rows (S = T), which need not be contiguous.
      block_q: queries of each of the two workers, a multiple of 64.
      block_kv: slots of a step, a multiple of 64.
      depth: number of prefetched steps, at least 2.
      interpret: simulate warpgroups, copies and barriers, on any device.

    Raises:
      ValueError: a dtype, head_dim or blocks that the tensor cores do not support, or
        shapes that do not match.
    """
    flash_triton.check(q, k, v, segment_ids)
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "q, k and v must all be bfloat16 or all float16, got "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.shape[3] % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {q.shape[3]}")
    if block_q % 64 or block_kv % 64 or depth < 2:
        raise ValueError(
            "block_q and block_kv must be multiples of 64 and depth at least 2, got "
            f"{block_q}, {block_kv} and {depth}"
        )
    blocks = Blocks(block_q, block_kv, depth)
    return _attend((blocks, interpret), q, k, v, q_start, segment_ids)


def _forward(
    settings: tuple[Blocks, bool],
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    blocks, interpret = settings
    batch, queries, heads, width = q.shape
    tile = WORKERS * blocks.q
    tiles = pl.cdiv(queries, tile)
    if q_start is None:
        q_start = jnp.zeros((batch,), jnp.int32)
    first, ids = jnp.zeros((batch, tiles), jnp.int32), None
    if segment_ids is not None:
        first = edges(segment_ids, Tiles(tile, blocks.kv, 0, 0)).first_kv
        pad = whole(queries, max(tile, blocks.kv)) - queries
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, pad)))

    swizzle = plgpu.find_swizzle(16 * width)
    transforms = (
        plgpu.TilingTransform((8, swizzle // 2)),
        plgpu.SwizzleTransform(swizzle),
    )

    def program(*refs: Ref) -> None:
        def allocated(*memory: Ref) -> None:
            packed = ids is not None
            _program(*refs, *memory, blocks=blocks, packed=packed, interpret=interpret)

        pl.run_scoped(
            allocated,
            plgpu.SMEM((WORKERS, blocks.q, width), q.dtype, transforms=transforms),
            plgpu.SMEM(
                (blocks.depth, blocks.kv, width), q.dtype, transforms=transforms
            ),
            plgpu.SMEM(
                (blocks.depth, blocks.kv, width), q.dtype, transforms=transforms
            ),
            plgpu.SMEM((WORKERS, blocks.q), jnp.float32),
            plgpu.Barrier(num_barriers=WORKERS),
            *(plgpu.Barrier(num_barriers=blocks.depth),) * 2,
            *(plgpu.Barrier(num_arrivals=WORKERS, num_barriers=blocks.depth),) * 2,
            plgpu.Barrier(num_arrivals=WORKERS),
            collective_axes="warpgroup",
        )

    out, lse = compat.mosaic_gpu_kernel(
        program,
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * tile), jnp.float32),
        ],
        interpret=interpret,
        grid=(heads, tiles, batch),
        grid_names=("head", "tile", "row"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, q_start, first, *([] if ids is None else [ids]))
    return out, lse[..., :queries]


def _backward(
    settings: tuple[Blocks, bool], q: Array, k: Array, *residuals: Any
) -> tuple[Array, Array, Array]:
    tiles = flash_triton.blocks_for(q, k.shape[2]).backward
    return flash_triton_backward.backward(tiles, settings[1], q, k, *residuals)


_attend = differentiable(_forward, _backward)


def _program(*refs: Ref, blocks: Blocks, packed: bool, interpret: bool) -> None:
    q_ref, k_ref, v_ref, start_ref, first_ref, *rest = refs
    ids_ref = rest.pop(0) if packed else None
    out_ref, sums_ref, q_smem, k_smem, v_smem, sums_smem, *barriers = rest
    q_here, k_here, v_here, k_free, v_free, turn = barriers
    queries, width = q_ref.shape[1], q_ref.shape[3]
    group = q_ref.shape[2] // k_ref.shape[1]
    slots = k_ref.shape[2]
    head, tile, row = (jax.lax.axis_index(name) for name in ("head", "tile", "row"))
    me = jax.lax.axis_index("warpgroup")
    start = start_ref[row]
    first = first_ref[row, tile]  # block of slots

    def steps(begin: Array, number: int) -> Array:
        """Number of blocks from `first` on that some queries see."""
        end = jnp.minimum(start + jnp.minimum(begin + number, queries), slots)
        return jax.lax.div(end + (blocks.kv - 1), blocks.kv) - first

    steps_of_program = steps(tile * (WORKERS * blocks.q), WORKERS * blocks.q)

    @pl.when(me == PRODUCER)
    def _fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")
        kv_head = jax.lax.div(head, group)

        @pl.loop(0, steps_of_program)
        def _one(step: Array) -> None:
            buffer = jax.lax.rem(step, blocks.depth)
            block = pl.ds((first + step) * blocks.kv, blocks.kv)
            for source, ring, here, free in (
                (k_ref, k_smem, k_here, k_free),
                (v_ref, v_smem, v_here, v_free),
            ):

                @pl.when(step >= blocks.depth)
                def _wait(free: Ref = free) -> None:
                    plgpu.barrier_wait(free.at[buffer])

                plgpu.copy_gmem_to_smem(
                    source.at[row, kv_head, block], ring.at[buffer], here.at[buffer]
                )

    @pl.when(me < WORKERS)
    def _work() -> None:
        plgpu.set_max_registers(232, action="increase")
        begin = tile * (WORKERS * blocks.q) + me * blocks.q
        mine = pl.ds(begin, blocks.q)
        q_mine = q_smem.at[me]
        plgpu.copy_gmem_to_smem(q_ref.at[row, mine, head], q_mine, q_here.at[me])
        plgpu.barrier_wait(q_here.at[me])
        ids = None
        if ids_ref is not None:
            ids = compat.load_vector(ids_ref.at[row, mine], along="rows")

        def synchronize() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(masked: bool, at: Array, sums: Sums) -> Sums:
            total, largest, weight = sums
            buffer = jax.lax.rem(at, blocks.depth)
            slot = (first + at) * blocks.kv

            def multiply(s_ref: Ref) -> Array:
                keys = compat.transposed(k_smem.at[buffer])
                plgpu.wgmma(s_ref, q_mine, keys)
                synchronize()  # the other worker may use the tensor cores
                return s_ref[...]

            plgpu.barrier_wait(k_here.at[buffer])
            shape = (blocks.q, blocks.kv)
            s = pl.run_scoped(multiply, ACCUMULATOR(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[buffer])
            s *= LOG2_E * width**-0.5
            if masked:
                layout = plgpu.Layout.WGMMA
                of_q = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                of_kv = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
                mask = of_kv + slot <= of_q + (start + begin)
                if ids is not None and ids_ref is not None:
                    slot_ids = compat.load_vector(
                        ids_ref.at[row, pl.ds(slot, blocks.kv)], along="columns"
                    )
                    mask &= _wide(ids, shape, 0) == _wide(slot_ids, shape, 1)
                s = jnp.where(mask, s, -jnp.inf)
            larger = jnp.maximum(largest, s.max(axis=1))
            shrink = jnp.exp2(largest - larger)
            p = jnp.exp2(s - _wide(larger, shape, 0))
            total *= _wide(shrink, total.shape, 0)
            weight = weight * shrink + p.sum(axis=1)
            p = p.astype(q_ref.dtype)
            # The softmax is finished before the tensor cores are requested.
            total, larger, weight, p = jax.lax.optimization_barrier(
                (total, larger, weight, p)
            )
            plgpu.barrier_wait(v_here.at[buffer])
            synchronize()

            def add(total_ref: Ref) -> None:
                plgpu.wgmma(total_ref, p, v_smem.at[buffer])

            if interpret:  # does not support wgmma from registers
                total += product(p, v_smem[buffer], 1, 0)
                plgpu.commit_smem()  # a plain read, before the buffer is filled again
            else:
                total = pl.run_state(add)(ACCUMULATOR.init(total))
            plgpu.barrier_arrive(v_free.at[buffer])
            return total, larger, weight

        def skip(at: Array, _: None) -> None:
            """Free a block that only the other worker uses, and synchronize twice."""
            buffer = jax.lax.rem(at, blocks.depth)
            plgpu.barrier_arrive(k_free.at[buffer])
            plgpu.barrier_arrive(v_free.at[buffer])
            synchronize()
            synchronize()

        steps_here = jnp.where(begin < queries, steps(begin, blocks.q), 0)
        # Before this block the first query sees all slots.
        full = jax.lax.div(start + begin + 1, blocks.kv)
        full = jnp.minimum(jnp.minimum(full, steps_here), 0 if packed else steps_here)
        sums = (
            _registers(0.0, (blocks.q, width)),
            _registers(LEAST, (blocks.q,)),
            _registers(0.0, (blocks.q,)),
        )
        pl.when(me == 1)(synchronize)  # half a step later
        sums = jax.lax.fori_loop(0, full, functools.partial(step, False), sums)
        sums = jax.lax.fori_loop(full, steps_here, functools.partial(step, True), sums)
        jax.lax.fori_loop(steps_here, steps_of_program, skip, None)
        pl.when(me == 0)(synchronize)
        total, largest, weight = sums
        q_mine[...] = (total / _wide(weight, total.shape, 0)).astype(q_ref.dtype)
        sums_smem.at[me][...] = largest / LOG2_E + jnp.log(weight)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_mine, out_ref.at[row, mine, head])
        plgpu.copy_smem_to_gmem(sums_smem.at[me], sums_ref.at[row, head, mine])
        plgpu.wait_smem_to_gmem(0)


def _wide(vector: Array, shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcast_in_dim(vector, shape, [axis])


def _registers(value: float, shape: tuple[int, ...]) -> Array:
    full = jnp.full(shape, value, jnp.float32)
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else compat.mosaic_gpu_layout("rows")
    return plgpu.layout_cast(full, layout)
