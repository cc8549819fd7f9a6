"""`linear`: the one function that consumes a projection's weight."""

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from llama_jax.types import Array, Float


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 means float32: TPUs and recent GPUs would otherwise round the inputs."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.lax.Precision.HIGHEST
    return jax.lax.Precision.DEFAULT


def linear(
    x: Float[Array, "*batch I"],
    w: Float[Array, "I O"],
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch O"]:
    """`x @ w` in the dtype of `x`, summed in float32 by every device that can.

    `out_dtype` asks for the sum itself, unrounded (the logits want that).
    """
    return jnp.matmul(
        x,
        w.astype(x.dtype),
        precision=matmul_precision(x.dtype),
        preferred_element_type=out_dtype,
    )
