"""Attention in plain array operations: the specification of all implementations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.kernels.precision import matmul_precision
from llama_jax.kernels.quantized_slots import (
    QuantizedSlots,
    dequantize_slots,
    zero_later_slots,
)

Slots = Float[Array, "B K S H"] | QuantizedSlots
Pages = Float[Array, "P K C H"] | QuantizedSlots


def causal_mask(
    q_start: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B T"] | None,
    queries: int,
    slots: int,
) -> Bool[Array, "_ T S"]:
    """True where a query attends: to slots up to its own, of its own segment.

    The first axis is B, or 1 if all rows have the same mask.
    """
    start = jnp.zeros((1,), jnp.int32) if q_start is None else q_start
    slot_of_query = start[:, None] + jnp.arange(queries)[None]
    mask = jnp.arange(slots)[None, None] <= slot_of_query[..., None]
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def attention(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """See `llama_jax.kernels.attention`; scores and softmax are float32."""
    rest = (q_start, segment_ids)
    if not isinstance(k, QuantizedSlots):
        return _attention(q, k, v, *rest)
    return jax.lax.platform_dependent(
        q, k, v, *rest, cpu=_head_by_head, default=_attention
    )


def _head_by_head(
    q: Array,
    k: Slots,
    v: Slots,
    q_start: Array | None,
    segment_ids: Array | None,
) -> Array:
    """`_attention`, one row and key/value head at a time.

    GPUs and TPUs dequantize int8 slots within the products. A CPU dequantizes them
    before, which for all heads at once takes eight times the memory that it reads.
    """
    batch, queries, heads, width = q.shape
    groups = k.shape[1]
    q_heads = q.reshape(batch, queries, groups, -1, width).swapaxes(1, 2)
    q_heads = q_heads.reshape(-1, 1, queries, heads // groups, width)
    rows = jax.tree.map(
        lambda x: jnp.repeat(x[:, None], groups, axis=0), (q_start, segment_ids)
    )
    heads_first = jax.tree.map(lambda x: x.reshape(-1, 1, 1, *x.shape[2:]), (k, v))
    out = jax.lax.map(
        lambda head: _attention(*head[:3], *head[3]), (q_heads, *heads_first, rows)
    )
    out = out.reshape(batch, groups, queries, heads // groups, width).swapaxes(1, 2)
    return out.reshape(q.shape)


def _attention(
    q: Array,
    k: Slots,
    v: Slots,
    q_start: Array | None,
    segment_ids: Array | None,
) -> Array:
    k, v = dequantize_slots(k, q.dtype), dequantize_slots(v, q.dtype)
    batch, queries, heads, width = q.shape
    groups = k.shape[1]
    precision = matmul_precision(q.dtype)
    # Queries and their groups in one axis, after the heads: plain batched products, in
    # which neither side is transposed. For `BTKGH,BKSH->BKGTS` XLA would transpose the
    # smaller operand, and with one row of queries copy all keys.
    grouped = (batch, queries, groups, heads // groups, width)
    q_rows = q.reshape(grouped).swapaxes(1, 2).reshape(batch, groups, -1, width)
    scores = jnp.einsum(
        "BKQH,BKSH->BKQS",
        q_rows,
        k,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    mask = causal_mask(q_start, segment_ids, queries, k.shape[2])
    mask = jnp.repeat(mask, heads // groups, axis=1)[:, None]
    scores = jnp.where(mask, scores * width**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v, precision=precision)
    out = out.reshape(batch, groups, queries, heads // groups, width).swapaxes(1, 2)
    return out.reshape(batch, queries, heads, width)


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int[Array, "B M"],
    *,
    q_start: Int[Array, " B"],
) -> Float[Array, "B T N H"]:
    """See `llama_jax.kernels.paged_attention`; gathers the pages of every row."""

    def gathered(pages: Array) -> Array:
        rows = jnp.moveaxis(pages[page_table], 1, 2)  # B K M C ...
        return rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])

    k, v = jax.tree.map(gathered, (k_pages, v_pages))
    v = zero_later_slots(v, q_start + q.shape[1])
    return attention(q, k, v, q_start=q_start)
