"""Flash attention for Hopper: Pallas, lowered to Mosaic GPU, with its own pipeline.

    grid (N, T / (2 · block_q), B); a program is three warpgroups of 128 threads

      fetcher (40 registers a thread)      TMA: block after block of k and of v into a
                                           ring of `depth` places, as they come free
      workers 0 and 1 (232 registers)      each has block_q queries of one head:
          tensor cores  q · kᵀ   │ softmax │  + p · v  │ q · kᵀ  │ softmax ...
          worker 1        ...    │ q · kᵀ  │  softmax  │ + p · v │ ...
      one multiplies while the other takes exponentials: they meet after every half.

    registers     the sum of values [block_q, H], scores and weights [block_q,
                  block_kv], the largest score and sum of weights of each query
    shared memory q of both workers (their output goes out through the same place),
                  the ring of k and v, swizzled as wgmma wants them
    HBM           q, k, v as they are, the output, each query's logsumexp

Blocks behind the last query of a program are not fetched, those before the first slot
of its segments neither; only blocks that cross the diagonal are masked. Head n reads
the keys of head n // (N / K). What lies behind an array's end comes as zeros, and is
not written: no array is padded but the logsumexp.

The backward pass is that of `flash_triton`, fed from the logsumexp that is kept here.
Tiles are chosen from registers and shared memory on paper; no device has timed them.

Ideas: Shah and others, FlashAttention-3 (arXiv:2407.08608), section 3.1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from llama_jax.kernels import compat
from llama_jax.kernels.gpu import flash_triton
from llama_jax.kernels.gpu.flash_triton import LEAST
from llama_jax.kernels.gpu.flash_triton_backward import (
    LOG2_E,
    Tiles,
    edges,
    product,
    whole,
)

ACCUMULATOR = plgpu.WGMMAAccumulatorRef
WORKERS = 2
FETCHER = WORKERS


class Blocks(NamedTuple):
    """Queries of a worker, slots of a step, and steps that are fetched ahead."""

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
    """`kernels.attention` for an H100 or H200 (compute capability 9.0), differentiable.

    Slots behind a row's last query must hold finite numbers: they are multiplied by
    weights of zero where they share a block with others.

    Args:
      q: queries, bfloat16 or float16.
      k: keys, of the same dtype.
      v: values, likewise.
      q_start: slot of each row's first query; 0 where not given.
      segment_ids: for packed rows (S = T); a segment need not be in one piece.
      block_q: queries of each of the two workers, a multiple of 64.
      block_kv: slots of a step, a multiple of 64.
      depth: steps that are fetched ahead, at least 2.
      interpret: simulate warpgroups, copies and barriers, on any device.

    Raises:
      ValueError: another dtype, a head that is not a multiple of 16 wide, blocks that
        the tensor cores cannot take, or shapes that do not fit each other.
    """
    flash_triton.check(q, k, v, segment_ids)
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: Hopper's kernel takes bfloat16 "
            "or float16, the same for all three"
        )
    if q.shape[3] % 16:
        raise ValueError(f"head_dim is {q.shape[3]}; it must be a multiple of 16")
    if block_q % 64 or block_kv % 64 or depth < 2:
        raise ValueError(
            f"blocks of {block_q} queries and {block_kv} slots, {depth} deep: write "
            "multiples of 64, at least 2 deep"
        )
    blocks = Blocks(block_q, block_kv, depth)
    return _attend(blocks, interpret, q, k, v, q_start, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    blocks: Blocks,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> Array:
    return _forward(blocks, interpret, q, k, v, q_start, segment_ids)[0]


_Kept = tuple[Array, Array, Array, Array | None, Array | None, Array, Array]


def _attend_forward(
    blocks: Blocks,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, _Kept]:
    out, logsumexp = _forward(blocks, interpret, q, k, v, q_start, segment_ids)
    return out, (q, k, v, q_start, segment_ids, out, logsumexp)


def _attend_backward(
    blocks: Blocks, interpret: bool, kept: _Kept, given: Array
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, q_start, segment_ids, out, logsumexp = kept
    gradients = flash_triton.gradients(
        *(q, k, v, out, logsumexp, given),
        q_start=q_start,
        segment_ids=segment_ids,
        interpret=interpret,
    )
    return *gradients, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    blocks: Blocks,
    interpret: bool,
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    segment_ids: Array | None,
) -> tuple[Array, Array]:
    batch, queries, heads, width = q.shape
    tile = WORKERS * blocks.q
    tiles = pl.cdiv(queries, tile)
    if q_start is None:
        q_start = jnp.zeros((batch,), jnp.int32)
    first, ids = jnp.zeros((batch, tiles), jnp.int32), None
    if segment_ids is not None:
        limits = edges(segment_ids, Tiles(tile, blocks.kv, 0, 0))
        assert limits is not None
        first = limits.first_kv
        pad = whole(queries, max(tile, blocks.kv)) - queries
        ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, pad)))

    swizzle = plgpu.find_swizzle(16 * width)
    transforms = (
        plgpu.TilingTransform((8, swizzle // 2)),
        plgpu.SwizzleTransform(swizzle),
    )

    def program(*refs: Any) -> None:
        def allocated(*memory: Any) -> None:
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

    out, logsumexp = compat.mosaic_gpu_kernel(
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
    return out, logsumexp[..., :queries]


def _program(*refs: Any, blocks: Blocks, packed: bool, interpret: bool) -> None:
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

    def steps(begin: Any, number: int) -> Any:
        """Of the queries from `begin` on: how many blocks from `first` they see."""
        end = jnp.minimum(start + jnp.minimum(begin + number, queries), slots)
        return jax.lax.div(end + (blocks.kv - 1), blocks.kv) - first

    of_program = steps(tile * (WORKERS * blocks.q), WORKERS * blocks.q)

    @pl.when(me == FETCHER)
    def _fetch() -> None:
        plgpu.set_max_registers(40, action="decrease")
        of_head = jax.lax.div(head, group)

        @pl.loop(0, of_program)
        def _one(step: Any) -> None:
            place = jax.lax.rem(step, blocks.depth)
            block = pl.ds((first + step) * blocks.kv, blocks.kv)
            for source, ring, here, free in (
                (k_ref, k_smem, k_here, k_free),
                (v_ref, v_smem, v_here, v_free),
            ):

                @pl.when(step >= blocks.depth)
                def _wait(free: Any = free) -> None:
                    plgpu.barrier_wait(free.at[place])

                plgpu.copy_gmem_to_smem(
                    source.at[row, of_head, block], ring.at[place], here.at[place]
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

        def meet() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(masked: bool, at: Any, sums: Any) -> Any:
            total, largest, weight = sums
            place = jax.lax.rem(at, blocks.depth)
            slot = (first + at) * blocks.kv

            def multiply(s_ref: Any) -> Any:
                keys = compat.transposed(k_smem.at[place])
                plgpu.wgmma(s_ref, q_mine, keys)
                meet()  # the other's turn at the tensor cores
                return s_ref[...]

            plgpu.barrier_wait(k_here.at[place])
            shape = (blocks.q, blocks.kv)
            s = pl.run_scoped(multiply, ACCUMULATOR(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[place])
            s *= LOG2_E * width**-0.5
            if masked:
                layout = plgpu.Layout.WGMMA
                of_q = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                of_kv = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
                mask = of_kv + slot <= of_q + (start + begin)
                if ids_ref is not None:
                    of_slots = compat.load_vector(
                        ids_ref.at[row, pl.ds(slot, blocks.kv)], along="columns"
                    )
                    mask &= _wide(ids, shape, 0) == _wide(of_slots, shape, 1)
                s = jnp.where(mask, s, -jnp.inf)
            larger = jnp.maximum(largest, s.max(axis=1))
            shrink = jnp.exp2(largest - larger)
            p = jnp.exp2(s - _wide(larger, shape, 0))
            total *= _wide(shrink, total.shape, 0)
            weight = weight * shrink + p.sum(axis=1)
            p = p.astype(q_ref.dtype)
            # All of the softmax is to be over before the tensor cores are asked for.
            total, larger, weight, p = jax.lax.optimization_barrier(
                (total, larger, weight, p)
            )
            plgpu.barrier_wait(v_here.at[place])
            meet()

            def add(total_ref: Any) -> None:
                plgpu.wgmma(total_ref, p, v_smem.at[place])

            if interpret:  # which knows no wgmma from registers
                total += product(p, v_smem[place], (1, 0))
                plgpu.commit_smem()  # a plain read, before the place is filled again
            else:
                total = pl.run_state(add)(ACCUMULATOR.init(total))
            plgpu.barrier_arrive(v_free.at[place])
            return total, larger, weight

        def skip(at: Any, _: None) -> None:
            """What only the other worker looks at comes free, and it is met twice."""
            place = jax.lax.rem(at, blocks.depth)
            plgpu.barrier_arrive(k_free.at[place])
            plgpu.barrier_arrive(v_free.at[place])
            meet()
            meet()

        own = jnp.where(begin < queries, steps(begin, blocks.q), 0)
        # Up to here the first query sees all of every block.
        full = jax.lax.div(start + begin + 1, blocks.kv)
        full = jnp.minimum(jnp.minimum(full, own), 0 if packed else own)
        sums = (
            _registers(0.0, (blocks.q, width)),
            _registers(LEAST, (blocks.q,)),
            _registers(0.0, (blocks.q,)),
        )
        pl.when(me == 1)(meet)  # half a step behind
        sums = jax.lax.fori_loop(0, full, functools.partial(step, False), sums)
        sums = jax.lax.fori_loop(full, own, functools.partial(step, True), sums)
        jax.lax.fori_loop(own, of_program, skip, None)
        pl.when(me == 0)(meet)
        total, largest, weight = sums
        q_mine[...] = (total / _wide(weight, total.shape, 0)).astype(q_ref.dtype)
        sums_smem.at[me][...] = largest / LOG2_E + jnp.log(weight)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_mine, out_ref.at[row, mine, head])
        plgpu.copy_smem_to_gmem(sums_smem.at[me], sums_ref.at[row, head, mine])
        plgpu.wait_smem_to_gmem(0)


def _wide(vector: Any, shape: tuple[int, ...], axis: int) -> Any:
    return jax.lax.broadcast_in_dim(vector, shape, [axis])


def _registers(value: float, shape: tuple[int, ...]) -> Any:
    full = jnp.full(shape, value, jnp.float32)
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else compat.mosaic_gpu_layout("rows")
    return plgpu.layout_cast(full, layout)
