"""`attention`: which implementation computes it, decided in one place."""

from typing import Literal

from jaxtyping import Array, Float, Int

from llama_jax.kernels import reference

Implementation = Literal["auto", "xla"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention: softmax(q·kᵀ/√H)·v over the slots ≤ the query's.

    Args:
      q: queries; head n reads key/value head n // (N // K).
      k: keys, heads before slots.
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
