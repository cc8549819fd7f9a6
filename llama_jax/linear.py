"""`linear`: the one function that consumes a projection's weight."""

import functools

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
    w = w.astype(x.dtype)
    inputs = w.shape[0]
    if x.size != inputs or inputs % _CPU_BLOCKS:
        return _product(x, w, out_dtype)
    return jax.lax.platform_dependent(
        x,
        w,
        cpu=functools.partial(_product_in_blocks, out_dtype=out_dtype),
        default=functools.partial(_product, out_dtype=out_dtype),
    )


_CPU_BLOCKS = 8
"""Parts that a product of one row is summed in; 4 to 16 do equally well."""


def _product(x: Array, w: Array, out_dtype: DTypeLike | None) -> Array:
    return jnp.matmul(
        x, w, precision=matmul_precision(x.dtype), preferred_element_type=out_dtype
    )


def _product_in_blocks(x: Array, w: Array, out_dtype: DTypeLike | None) -> Array:
    """A product of one row, as a batch of partial ones that are added up.

    XLA:CPU spreads a batch over the cores better than one matrix-vector product of a
    layer's size: 12 layers of width 768 stream at 20 GB/s instead of 15 on two cores.
    """
    parts = jnp.matmul(
        x.reshape(_CPU_BLOCKS, 1, -1),
        w.reshape(_CPU_BLOCKS, -1, w.shape[1]),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    summed = jnp.sum(parts, axis=0).astype(out_dtype or x.dtype)
    return summed.reshape(*x.shape[:-1], w.shape[1])
