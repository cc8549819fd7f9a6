"""Keys and values in int8: half the bytes that decoding reads."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8


class QuantizedSlots(NamedTuple):
    """Int8 keys or values with a scale per slot and head; `values · scales` is meant.

    The leading axes are B K for a cache and P K for pages.

    Attributes:
      values: integers from -127 to 127.
      scales: float32 step sizes.
    """

    values: Int8[Array, "*K S H"]
    scales: Float[Array, "*K S"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        return self.values.shape


def quantize_slots(slots: Float[Array, "*K S H"]) -> QuantizedSlots:
    """Round to 255 steps between ± the largest magnitude of each slot and head.

    Args:
      slots: keys or values.

    Returns:
      Int8 values with float32 scales; the scale of a slot of zeros is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from llama_jax.kernels import quantize_slots
      >>> quantize_slots(jnp.array([[[[1.27, -0.5, 0.0]]]])).values
      Array([[[[127, -50,   0]]]], dtype=int8)
    """
    slots = slots.astype(jnp.float32)
    scales = jnp.max(jnp.abs(slots), axis=-1) / 127
    steps = slots / jnp.where(scales == 0, 1, scales)[..., None]
    return QuantizedSlots(jnp.round(steps).astype(jnp.int8), scales)


def dequantize_slots(
    slots: Float[Array, "*K S H"] | QuantizedSlots, dtype: DTypeLike
) -> Float[Array, "*K S H"]:
    """Return the values in `dtype`; arrays that are not quantized are only cast."""
    if isinstance(slots, QuantizedSlots):
        return (slots.values * slots.scales[..., None]).astype(dtype)
    return slots.astype(dtype)
