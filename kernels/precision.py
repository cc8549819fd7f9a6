"""The precision of matrix products: float32 operands mean float32 arithmetic."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """The precision for operands of a dtype: exact for float32, else the default.

    By default TPUs round float32 operands to bfloat16, and GPUs to TF32.
    """
    exact = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


def product(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contract one axis of each matrix, accumulating in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=matmul_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )
