"""Keys and values in int8: half the bytes that decoding reads."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Int8

_Slots = TypeVar("_Slots")


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


def zero_later_slots(slots: _Slots, lengths: Int[Array, " B"]) -> _Slots:
    """Return slots with zeros from the length of each row on.

    What lies there may be NaN of another request, and 0 · NaN is NaN in the product
    with values that no query sees.

    Args:
      slots: a tree of arrays `[B, K, S, ...]`.
      lengths: slots of each row that keep what they hold.
    """

    def earlier(array: Array) -> Array:
        is_kept = jnp.arange(array.shape[2])[None] < lengths[:, None]
        is_kept = is_kept.reshape(len(is_kept), 1, -1, *[1] * (array.ndim - 3))
        return jnp.where(is_kept, array, jnp.zeros_like(array))

    return jax.tree.map(earlier, slots)
