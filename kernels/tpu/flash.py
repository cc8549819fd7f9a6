"""Flash attention for TPUs, differentiable.

The passes are in `flash_forward.py` and `flash_backward.py`, each with a picture of its
tiling.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from llama_jax.kernels.differentiable import differentiable, output_dot_gradient
from llama_jax.kernels.tpu.flash_backward import flash_backward
from llama_jax.kernels.tpu.flash_forward import flash_forward
from llama_jax.kernels.tpu.flash_tiles import Tiles


class Blocks(NamedTuple):
    """Tile sizes of both passes, and the slots whose gradients VMEM holds at once."""

    forward: Tiles
    backward: Tiles
    chunk: int = 8192


# Among the fewest bundles in the compiler's static schedules for v5e and v6e, libtpu
# 0.0.52, 2026-11-23: `python -m llama_jax.bench kernels --sweep`.
ROUNDED = Blocks(forward=Tiles(q=1024, kv=512), backward=Tiles(q=1024, kv=512))
EXACT = Blocks(forward=Tiles(q=512, kv=256), backward=Tiles(q=512, kv=256))


def blocks_for(dtype: DTypeLike) -> Blocks:
    """Tile sizes for a dtype: float32 takes six MXU passes, and more registers."""
    return EXACT if jnp.dtype(dtype) == jnp.float32 else ROUNDED


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute `llama_jax.kernels.attention` on a TPU.

    Args:
      q: queries.
      k: keys, cast to q's dtype.
      v: values, cast to q's dtype.
      q_start: slot of each row's first query; defaults to 0.
      segment_ids: segments of packed rows.
      blocks: tile sizes; defaults to the best known ones.
      interpret: run in interpret mode, on any device.
    """
    settings = blocks or blocks_for(q.dtype), interpret
    q, k, v = q.swapaxes(1, 2), k.astype(q.dtype), v.astype(q.dtype)
    return _attend(settings, q, k, v, q_start, segment_ids).swapaxes(1, 2)


def _forward(
    settings: tuple[Blocks, bool],
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    ids: Array | None,
    *,
    with_lse: bool = True,
) -> tuple[Array, Array | None]:
    blocks, interpret = settings
    pair = None if ids is None else (ids, ids)
    return flash_forward(
        q, k, v, q_start, pair,
        tiles=blocks.forward, with_lse=with_lse, interpret=interpret,
    )  # fmt: skip


def _inference(settings: tuple[Blocks, bool], *inputs: Array | None) -> Array:
    return _forward(settings, *inputs, with_lse=False)[0]  # type: ignore[arg-type]


def _backward(
    settings: tuple[Blocks, bool],
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    ids: Array | None,
    out: Array,
    lse: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    blocks, interpret = settings
    pair = None if ids is None else (ids, ids)
    dq, dk, dv = flash_backward(
        q, k, v, q_start, pair, lse, output_dot_gradient(out, d_out), d_out,
        tiles=blocks.backward, chunk=blocks.chunk, dq_dtype=q.dtype,
        interpret=interpret,
    )  # fmt: skip
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype)


_attend = differentiable(_forward, _backward, inference=_inference)
