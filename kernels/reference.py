"""Attention in plain array operations: the specification that kernels are held to."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


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
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """See `llama_jax.kernels.attention`; scores and softmax are float32."""
    batch, queries, heads, width = q.shape
    groups = k.shape[1]
    precision = (
        jax.lax.Precision.HIGHEST
        if q.dtype == jnp.float32
        else jax.lax.Precision.DEFAULT
    )
    grouped = q.reshape(batch, queries, groups, heads // groups, width)
    scores = jnp.einsum(
        "BTKGH,BKSH->BKGTS",
        grouped,
        k.astype(q.dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    mask = causal_mask(q_start, segment_ids, queries, k.shape[2])
    scores = jnp.where(mask[:, None, None], scores * width**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum(
        "BKGTS,BKSH->BTKGH", weights, v.astype(q.dtype), precision=precision
    )
    return out.reshape(batch, queries, heads, width)
