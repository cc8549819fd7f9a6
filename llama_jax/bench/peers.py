"""JAX's own attention kernels for TPUs, set up for the work that ours do.

Each builder returns a function with its arguments. q and what is computed lie as the
kernels want them, `[B, N, T, H]`: a transposition before and after ours cancels the one
that it begins and ends with, so that nobody is charged for a copy that depends on the
model around it. Numbers that decide what a kernel executes are arrays, all else only
shapes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.types import Array

Kind = Literal["flash", "backward", "decode"]


class Heads(NamedTuple):
    """N query heads, K key/value heads, and H."""

    n: int
    k: int
    h: int


class Work(NamedTuple):
    """What there is to compute, in bfloat16 but for what is held in eight bits.

    Attributes:
      kind: causal attention of whole rows, its gradient, or of one query per row.
      heads: of the model.
      length: T, or S.
      rows: B.
      page: slots of a page, where kernels read pages.
      eight_bits: the slots are held so, each with a scale.
    """

    kind: Kind
    heads: Heads
    length: int
    rows: int = 1
    page: int = 128
    eight_bits: bool = False


class Built(NamedTuple):
    """A function, and its arguments or their shapes."""

    function: Callable[..., Any]
    arguments: Sequence[np.ndarray | jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to do a work.

    Attributes:
      name: of the kernel.
      tile: its tile sizes, as they are printed.
      build: makes the function; raises ImportError where this jax lacks the kernel.
    """

    name: str
    tile: str
    build: Callable[[], Built]


# The fastest of the sweep below, in bundles, on v5e and v6e.
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
# Slots of a block. Larger ones are up to 5 % faster and take minutes to compile.
_PAGED, _PAGED_SWEEP = (4096,), (1024, 2048, 4096)
_RAGGED_BYTES = 2**23  # 512 slots of 32 heads' keys and values
_RAGGED_SLOTS = 1024
_POOL_BYTES = 2**32  # of keys, and as many of values


def peers(work: Work, chip: str, *, sweep: bool) -> Iterator[Candidate]:
    """Every kernel of jax's that does the work, at its best tiles or at all of them."""
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
    if work.eight_bits:
        return  # ragged_paged_attention has one scale for all slots
    best = min(_RAGGED_SLOTS, _RAGGED_BYTES // (4 * work.heads.k * work.heads.h))
    for slots in (best // 4, best // 2, best) if sweep else (best,):
        slots = min(slots, work.length)
        tile = _tile(work, slots)
        yield Candidate("ragged_paged_attention", tile, _ragged(work, slots))


def _tile(work: Work, slots: int) -> str:
    return f"{slots} slots, pages of {work.page}"


def causal_shapes(work: Work) -> list[jax.ShapeDtypeStruct]:
    """q, k, v of whole rows; with the output's gradient for the backward pass."""
    n, k, h = work.heads
    q = jax.ShapeDtypeStruct((work.rows, n, work.length, h), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((work.rows, k, work.length, h), jnp.bfloat16)
    return [q, kv, kv, q] if work.kind == "backward" else [q, kv, kv]


def with_gradient(work: Work, attend: Callable[..., Array]) -> Callable[..., Any]:
    """The function itself, or what computes its gradients from the output's."""

    def gradients(q: Array, k: Array, v: Array, d_out: Array) -> Any:
        return jax.vjp(attend, q, k, v)[1](d_out)

    return gradients if work.kind == "backward" else attend


def _splash(work: Work, blocks: dict[str, Any]) -> Callable[[], Built]:
    def build() -> Built:
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

        def of_a_row(q: Array, k: Array, v: Array) -> Array:
            return attend(q[0], k[0], v[0])[None]

        return Built(with_gradient(work, of_a_row), causal_shapes(work))

    return build


def _flash(work: Work, block_q: int, block_kv: int) -> Callable[[], Built]:
    def build() -> Built:
        from jax.experimental.pallas.ops.tpu import flash_attention as kernel

        blocks = kernel.BlockSizes(
            block_q=block_q, block_k_major=block_kv, block_k=block_kv, block_b=1
        )

        def attend(q: Array, k: Array, v: Array) -> Array:
            return kernel.flash_attention(q, k, v, causal=True, block_sizes=blocks)

        return Built(attend, causal_shapes(work))

    return build


def pages(work: Work) -> tuple[int, np.ndarray]:
    """How many there are, and each row's, one row's after another's.

    As many as a chip may have room for: behind the last, rows have the first again.
    """
    per_row = work.length // work.page
    most = _POOL_BYTES // (2 * work.heads.k * work.page * work.heads.h)
    count = min(work.rows * per_row, most)
    table = np.arange(work.rows * per_row, dtype=np.int32) % count
    return count, table.reshape(work.rows, per_row)


def _paged(work: Work, slots: int) -> Callable[[], Built]:
    def build() -> Built:
        from jax.experimental.pallas.ops.tpu.paged_attention import (
            paged_attention,
            quantization_utils,
        )

        n, k, h = work.heads
        count, table = pages(work)
        dtype = jnp.int8 if work.eight_bits else jnp.bfloat16
        pool = jax.ShapeDtypeStruct((k, count, work.page, h), dtype)
        scales = jax.ShapeDtypeStruct((*pool.shape[:3], 1), jnp.float32)

        def attend(q: Array, lengths: Array, table: Array, *pools: Any) -> Array:
            held: Any = pools
            if work.eight_bits:
                tensor = quantization_utils.QuantizedTensor
                held = tensor(*pools[:2]), tensor(*pools[2:])
            return paged_attention(
                q, *held, lengths, table, pages_per_compute_block=slots // work.page
            )

        q = jax.ShapeDtypeStruct((work.rows, n, h), jnp.bfloat16)
        lengths = np.full(work.rows, work.length, np.int32)
        pools = [pool, scales] * 2 if work.eight_bits else [pool] * 2
        return Built(attend, [q, lengths, table, *pools])

    return build


def _ragged(work: Work, slots: int) -> Callable[[], Built]:
    def build() -> Built:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
            ragged_paged_attention,
        )

        n, k, h = work.heads
        count, table = pages(work)

        def attend(q: Array, pool: Array, *numbers: Array) -> Array:
            return ragged_paged_attention(
                q,
                pool,
                *numbers,
                num_kv_pages_per_block=slots // work.page,
                num_queries_per_block=1,  # eight take 40 % longer
                vmem_limit_bytes=64 << 20,
            )

        q = jax.ShapeDtypeStruct((work.rows, n, h), jnp.bfloat16)
        pool = jax.ShapeDtypeStruct((count, work.page, 2 * k, h), jnp.bfloat16)
        lengths = np.full(work.rows, work.length, np.int32)
        first = np.arange(work.rows + 1, dtype=np.int32)
        rows = np.array([work.rows], np.int32)
        return Built(attend, [q, pool, lengths, table, first, rows])

    return build
