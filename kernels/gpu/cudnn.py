"""Attention by NVIDIA's cuDNN, through `jax.nn.dot_product_attention`.

What runs where is cuDNN's: one fused kernel that keeps a block of queries, its scores
and its sums on the chip, forward and backward, for Ampere and later. This file only
says in cuDNN's words what a query may see:

    queries and slots alike, no q_start   its causal mask, built in; no mask in memory
    one query a row, over a cache         lengths of the rows' keys; no mask in memory
    several, over a cache; packed rows    a mask `[B, 1, T, S]` in memory, in q's dtype

cuDNN's causal mask begins at slot 0 for all rows, so that it cannot say `q_start`. It
takes slots before heads: XLA transposes the keys and values, which copies them. For
training and prefill that is little, for decoding it is as much as the attention.
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
    """`kernels.attention` by cuDNN, differentiable; never anything else's.

    Slots behind a row's last query must hold finite numbers.

    Args:
      q: queries, bfloat16 or float16.
      k: keys, cast to q's dtype.
      v: values, likewise.
      q_start: slot of each row's first query; 0 where not given.
      segment_ids: for packed rows (S = T).

    Raises:
      ValueError: slots of eight bits, float32, or a head that cuDNN cannot hold.
      RuntimeError: there is no cuDNN.
      NotImplementedError: this cuDNN or GPU cannot do what is asked, such as a gradient
        for odd T or S.
    """
    if isinstance(k, QuantizedSlots) or isinstance(v, QuantizedSlots):
        raise ValueError("cuDNN reads no slots of eight bits; dequantize them first")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"cuDNN attends in bfloat16 or float16, not in {q.dtype}")
    queries, width, slots = q.shape[1], q.shape[3], k.shape[2]
    if width % 8 or width > 256:
        raise ValueError(
            f"head_dim is {width}; cuDNN takes multiples of 8, up to 128, or 256 on "
            "Hopper and later"
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
