"""Flash attention for TPUs, and its derivative.

The passes are in `flash_forward_tpu.py` and `flash_backward_tpu.py`, each with a
picture of its tiling.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.kernels.tpu.flash_backward import flash_backward
from llama_jax.kernels.tpu.flash_forward import flash_forward
from llama_jax.kernels.tpu.flash_tiles import Tiles


class Blocks(NamedTuple):
    """The tiles of both passes, and how many slots' gradients VMEM holds at once."""

    forward: Tiles
    backward: Tiles
    chunk: int = 8192


# Among the fewest bundles in the compiler's static schedules for v5e and v6e, libtpu
# 0.0.52, 2026-11-23: `python -m llama_jax.bench kernels --sweep`.
ROUNDED = Blocks(forward=Tiles(q=1024, kv=512), backward=Tiles(q=1024, kv=512))
EXACT = Blocks(forward=Tiles(q=512, kv=256), backward=Tiles(q=512, kv=256))


def blocks_for(dtype: Any) -> Blocks:
    """Sizes for a dtype: float32 takes six passes of the MXU, and more registers."""
    return EXACT if dtype == jnp.float32 else ROUNDED


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """See `llama_jax.kernels.attention`.

    Args:
      q: queries.
      k: keys.
      v: values.
      q_start: slot of each row's first query.
      segment_ids: of packed rows.
      blocks: sizes; the best that are known where not given.
      interpret: run without a TPU, slowly.
    """
    ids = None if segment_ids is None else (segment_ids, segment_ids)
    out = _attend(
        q.swapaxes(1, 2),
        k.astype(q.dtype),
        v.astype(q.dtype),
        q_start,
        ids,
        blocks or blocks_for(q.dtype),
        interpret,
    )
    return out.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: Any, k: Any, v: Any, q_start: Any, ids: Any, blocks: Blocks, interpret: Any
) -> Array:
    settings = {"tiles": blocks.forward, "interpret": interpret}
    return flash_forward(q, k, v, q_start, ids, with_lse=False, **settings)[0]


def _forward(
    q: Any, k: Any, v: Any, q_start: Any, ids: Any, blocks: Blocks, interpret: Any
) -> tuple[Array, Any]:
    settings = {"tiles": blocks.forward, "interpret": interpret}
    out, lse = flash_forward(q, k, v, q_start, ids, **settings)
    return out, (q, k, v, q_start, ids, out, lse)


def _backward(blocks: Blocks, interpret: Any, kept: Any, d_out: Array) -> Any:
    q, k, v, q_start, ids, out, lse = kept
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    grads = flash_backward(
        q, k, v, q_start, ids, lse, delta, d_out,
        tiles=blocks.backward, chunk=blocks.chunk, dq_dtype=q.dtype,
        interpret=interpret,
    )  # fmt: skip
    no_derivative = jax.tree.map(
        lambda x: np.zeros(x.shape, jax.dtypes.float0), (q_start, ids)
    )
    return *(grad.astype(q.dtype) for grad in grads), *no_derivative


_attend.defvjp(_forward, _backward)
