"""Attention in plain array operations: the specification that kernels are held to."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from llama_jax.kernels.quantized_slots import QuantizedSlots, dequantize_slots

Slots = Float[Array, "B K S H"] | QuantizedSlots
Pages = Float[Array, "P K C H"] | QuantizedSlots


def precision_of(dtype: DTypeLike) -> jax.lax.Precision:
    """Float32 means float32 products, not a TPU's roundings to bfloat16."""
    exact = dtype == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def causal_mask(
    q_start: Int[Array, " B"] | None,
    segment_ids: Int[Array, "B T"] | None,
    queries: int,
    slots: int,
) -> Bool[Array, "B T S"]:
    """True where a query may look: at slots not behind it, of its own segment."""
    start = jnp.zeros((1,), jnp.int32) if q_start is None else q_start
    slot_of_query = start[:, None] + jnp.arange(queries)
    mask = jnp.arange(slots) <= slot_of_query[..., None]
    if segment_ids is not None:
        mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
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


def _head_by_head(q: Array, k: Slots, v: Slots, q_start: Any, ids: Any) -> Array:
    """The same for each row and key/value head, one after another.

    GPUs and TPUs widen eight-bit slots within the products. A CPU widens them before,
    all at once if it is let, to eight times as much as it then reads.
    """
    batch, queries, heads, width = q.shape
    groups = k.shape[1]

    def apart(x: Array) -> Array:
        return x.reshape(-1, 1, 1, *x.shape[2:])

    q_heads = q.reshape(batch, queries, groups, -1, width).swapaxes(1, 2)
    q_heads = q_heads.reshape(-1, 1, queries, heads // groups, width)
    rest = jax.tree.map(
        lambda x: jnp.repeat(x[:, None], groups, axis=0), (q_start, ids)
    )
    out = jax.lax.map(
        lambda head: _attention(*head[:3], *head[3]),
        (q_heads, *jax.tree.map(apart, (k, v)), rest),
    )
    out = out.reshape(batch, groups, queries, heads // groups, width).swapaxes(1, 2)
    return out.reshape(q.shape)


def _attention(q: Array, k: Slots, v: Slots, q_start: Any, segment_ids: Any) -> Array:
    k, v = dequantize_slots(k, q.dtype), dequantize_slots(v, q.dtype)
    batch, queries, heads, width = q.shape
    groups = k.shape[1]
    precision = precision_of(q.dtype)
    # Queries and their groups in one axis, behind the heads: as plain batched matrix
    # products neither side of which need be transposed. XLA would turn the operands of
    # the shorter `BTKGH,BKSH->BKGTS`, and with one row of queries copy all keys.
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
    """See `llama_jax.kernels.paged_attention`; every row's pages are put together."""

    def rows(pages: Array) -> Array:
        of_row = jnp.moveaxis(pages[page_table], 1, 2)  # B K M C ...
        return of_row.reshape(*of_row.shape[:2], -1, *of_row.shape[4:])

    k, v = jax.tree.map(rows, (k_pages, v_pages))
    return attention(q, k, v, q_start=q_start)
