"""JAX's own attention kernels for TPUs."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.bench.attention_work import (
    Call,
    Candidate,
    Work,
    causal_shapes,
    page_table,
    with_gradient,
)
from llama_jax.types import Array, PyTree

# The fastest of the sweep below on v5e and v6e, in bundles.
_SPLASH = {"v5e": (512, 1024, 512), "v6e": (1024, 1024, 512)}
_SPLASH_SWEEP = (
    (512, 512, 512),
    (512, 1024, 512),
    (512, 2048, 512),
    (1024, 512, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 2048, 512),
    (2048, 1024, 512),
)
_BACKWARD_SWEEP = ((512, 512), (512, 1024), (1024, 512), (1024, 1024))
_FLASH_SWEEP = ((512, 512), (512, 1024), (1024, 512), (1024, 1024))
# Slots per block. Larger blocks are up to 5 % faster and take minutes to compile.
_PAGED, _PAGED_SWEEP = (4096,), (1024, 2048, 4096)
_RAGGED_BYTES = 2**23  # 512 slots of 32 heads' keys and values
_RAGGED_SLOTS = 1024


def jax_kernels(work: Work, chip: str, *, sweep: bool) -> Iterator[Candidate]:
    """Every kernel of jax that can do the work, at its best tiles or at all of them."""
    if work.kind == "flash":
        yield from _forward(work, chip, sweep)
    elif work.kind == "backward":
        yield from _backward(work, sweep)
    else:
        yield from _decode(work, sweep)


def _forward(work: Work, chip: str, sweep: bool) -> Iterator[Candidate]:
    best = _SPLASH.get(chip, (512, 1024, 512))
    for tile in _SPLASH_SWEEP if sweep else (best,):
        q, kv, compute = tile
        if work.length % max(tile) == 0:
            blocks = {"block_q": q, "block_kv": kv, "block_kv_compute": compute}
            yield Candidate("splash", f"{q}x{kv}/{compute}", _splash(work, blocks))
    if work.heads.n == work.heads.k:
        for q, kv in _FLASH_SWEEP if sweep else ((512, 512),):
            yield Candidate("flash_attention", f"{q}x{kv}", _flash(work, q, kv))


def _backward(work: Work, sweep: bool) -> Iterator[Candidate]:
    forward = {"block_q": 512, "block_kv": 512, "block_kv_compute": 512}
    for q, kv in _BACKWARD_SWEEP if sweep else ((512, 512),):
        if work.length % max(q, kv):
            continue
        dkv = {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": 512}
        dq = {"block_q_dq": q, "block_kv_dq": kv}
        separate = _splash(work, {**forward, **dkv, **dq})
        yield Candidate("splash dq + dkv", f"{q}x{kv}", separate)
        fused = _splash(work, {**forward, **dkv, "use_fused_bwd_kernel": True})
        yield Candidate("splash fused", f"{q}x{kv}", fused)


def _decode(work: Work, sweep: bool) -> Iterator[Candidate]:
    for slots in _PAGED_SWEEP if sweep else _PAGED:
        slots = min(slots, work.length)
        yield Candidate("paged_attention", _tile(work, slots), _paged(work, slots))
    if work.int8:
        return  # ragged_paged_attention has one scale for all slots
    best = min(_RAGGED_SLOTS, _RAGGED_BYTES // (4 * work.heads.k * work.heads.h))
    for slots in (best // 4, best // 2, best) if sweep else (best,):
        slots = min(slots, work.length)
        tile = _tile(work, slots)
        yield Candidate("ragged_paged_attention", tile, _ragged(work, slots))


def _tile(work: Work, slots: int) -> str:
    return f"{slots} slots, pages of {work.page}"


def _splash(work: Work, blocks: dict[str, Any]) -> Callable[[], Call]:
    def build() -> Call:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as kernel,
        )
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_mask as masks,
        )

        mask = masks.CausalMask((work.length, work.length))
        attend = kernel.make_splash_mha(
            mask=masks.MultiHeadMask([mask] * work.heads.n),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=kernel.BlockSizes(**blocks),
        )

        def attend_row(q: Array, k: Array, v: Array) -> Array:
            return attend(q[0], k[0], v[0])[None]

        return Call(with_gradient(work, attend_row), causal_shapes(work))

    return build


def _flash(work: Work, block_q: int, block_kv: int) -> Callable[[], Call]:
    def build() -> Call:
        from jax.experimental.pallas.ops.tpu import flash_attention as kernel

        blocks = kernel.BlockSizes(
            block_q=block_q, block_k_major=block_kv, block_k=block_kv, block_b=1
        )

        def attend(q: Array, k: Array, v: Array) -> Array:
            return kernel.flash_attention(q, k, v, causal=True, block_sizes=blocks)

        return Call(attend, causal_shapes(work))

    return build


def _paged(work: Work, slots: int) -> Callable[[], Call]:
    def build() -> Call:
        from jax.experimental.pallas.ops.tpu.paged_attention import (
            paged_attention,
            quantization_utils,
        )

        n, k, h = work.heads
        count, table = page_table(work)
        dtype = jnp.int8 if work.int8 else jnp.bfloat16
        pool = jax.ShapeDtypeStruct((k, count, work.page, h), dtype)
        scales = jax.ShapeDtypeStruct((*pool.shape[:3], 1), jnp.float32)

        def attend(q: Array, lengths: Array, table: Array, *pools: Array) -> Array:
            k_and_v: PyTree = pools
            if work.int8:
                tensor = quantization_utils.QuantizedTensor
                k_and_v = tensor(*pools[:2]), tensor(*pools[2:])
            return paged_attention(
                q, *k_and_v, lengths, table, pages_per_compute_block=slots // work.page
            )

        q = jax.ShapeDtypeStruct((work.rows, n, h), jnp.bfloat16)
        lengths = np.full(work.rows, work.length, np.int32)
        pools = [pool, scales] * 2 if work.int8 else [pool] * 2
        return Call(attend, [q, lengths, table, *pools])

    return build


def _ragged(work: Work, slots: int) -> Callable[[], Call]:
    def build() -> Call:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
            ragged_paged_attention,
        )

        n, k, h = work.heads
        count, table = page_table(work)

        def attend(q: Array, pool: Array, *scalars: Array) -> Array:
            return ragged_paged_attention(
                q,
                pool,
                *scalars,
                num_kv_pages_per_block=slots // work.page,
                num_queries_per_block=1,  # eight queries take 40 % longer
                vmem_limit_bytes=64 << 20,
            )

        q = jax.ShapeDtypeStruct((work.rows, n, h), jnp.bfloat16)
        pool = jax.ShapeDtypeStruct((count, work.page, 2 * k, h), jnp.bfloat16)
        lengths = np.full(work.rows, work.length, np.int32)
        first = np.arange(work.rows + 1, dtype=np.int32)
        rows = np.array([work.rows], np.int32)
        return Call(attend, [q, pool, lengths, table, first, rows])

    return build
