"""Attention by NVIDIA's cuDNN, through `jax.nn.dot_product_attention`.

cuDNN has fused kernels, forward and backward, for Ampere and later. This module
translates what a query may attend to:

    as many queries as slots, no q_start  cuDNN's causal mask; no mask in memory
    one query per row, over a cache       key lengths of the rows; no mask in memory
    several, over a cache; packed rows    a mask `[B, 1, T, S]` in memory, in q's dtype

cuDNN's causal mask begins at slot 0 in all rows, so it cannot express `q_start`. It
takes slots before heads: XLA transposes, and so copies, the keys and values. That is
little for training and prefill, but as much as the attention itself for decoding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.kernels.quantized_slots import QuantizedSlots
from llama_jax.kernels.reference import Slots, causal_mask


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Compute `kernels.attention` by cuDNN, differentiable, without any fallback.

    Slots after a row's last query must be finite.

    Args:
      q: queries, bfloat16 or float16.
      k: keys, cast to q's dtype.
      v: values, cast to q's dtype.
      q_start: slot of each row's first query; defaults to 0.
      segment_ids: segments of packed rows (S = T).

    Raises:
      ValueError: int8 slots, or a dtype or head_dim that cuDNN does not support.
      RuntimeError: cuDNN is not installed.
      NotImplementedError: this cuDNN or GPU does not support the call, such as a
        gradient for odd T or S.
    """
    if isinstance(k, QuantizedSlots) or isinstance(v, QuantizedSlots):
        raise ValueError("cuDNN does not support int8 slots; dequantize them first")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"cuDNN requires bfloat16 or float16, not {q.dtype}")
    queries, width, slots = q.shape[1], q.shape[3], k.shape[2]
    if width % 8 or width > 256:
        raise ValueError(
            "head_dim must be a multiple of 8, at most 128 (256 on Hopper and later) "
            f"for cuDNN, got {width}"
        )
    lengths = mask = None
    causal = q_start is None and queries == slots
    if segment_ids is not None or (not causal and queries > 1):
        mask = causal_mask(q_start, segment_ids, queries, slots)[:, None]
        causal = False
    elif not causal:
        start = jnp.zeros(q.shape[0], jnp.int32) if q_start is None else q_start
        lengths = start.astype(jnp.int32) + 1
    if mask is not None and mask.shape[0] != q.shape[0]:
        mask = jnp.broadcast_to(mask, (q.shape[0], *mask.shape[1:]))
    return jax.nn.dot_product_attention(
        q,
        k.astype(q.dtype).swapaxes(1, 2),
        v.astype(q.dtype).swapaxes(1, 2),
        mask=mask,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )
