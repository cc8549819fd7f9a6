"""`attention`: which implementation computes it, decided in one place."""

from typing import Literal

from jaxtyping import Array, Float, Int

from llama_jax.kernels import reference
from llama_jax.kernels.reference import Pages, Slots

Implementation = Literal["auto", "xla"]


def attention(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention: softmax(q·kᵀ/√H)·v over the slots ≤ the query's.

    Args:
      q: queries; head n reads key/value head n // (N // K).
      k: keys, heads before slots; `QuantizedSlots` where they are held in eight bits.
      v: values, likewise.
      q_start: slot of each row's first query; 0 where not given.
      segment_ids: for packed rows (S = T): a query sees its own segment only.
      implementation: `"xla"`, plain array operations, works everywhere; `"auto"` is
        the best that works here. A named one is never replaced by another.

    Raises:
      ValueError: the implementation does not exist.
    """
    if implementation not in ("auto", "xla"):
        raise ValueError(
            f"attention implementation {implementation!r} does not exist; "
            "choose from auto, xla"
        )
    return reference.attention(q, k, v, q_start=q_start, segment_ids=segment_ids)


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int[Array, "B M"],
    *,
    q_start: Int[Array, " B"],
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """`attention` over a cache whose slots lie in pages, C to a page, in any order.

    Args:
      q: queries.
      k_pages: pages of keys, shared by all rows.
      v_pages: of values, likewise.
      page_table: where each row's pages lie; slot s is in page `s // C` of its row.
        Entries behind a row's last slot are not looked at, but must be pages.
      q_start: slot of each row's first query.
      implementation: as of `attention`.
    """
    if implementation not in ("auto", "xla"):
        raise ValueError(
            f"attention implementation {implementation!r} does not exist; "
            "choose from auto, xla"
        )
    return reference.paged_attention(q, k_pages, v_pages, page_table, q_start=q_start)
