"""Keys and values in eight bits: half the bytes that decoding has to read."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8


class QuantizedSlots(NamedTuple):
    """Keys or values as whole numbers, with a scale for every slot and head.

    A number is `values · scales`. The leading axes are B K for a cache and P K for
    pages.
    """

    values: Int8[Array, "*K S H"]
    scales: Float[Array, "*K S"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers that are meant."""
        return self.values.shape


def quantize_slots(slots: Float[Array, "*K S H"]) -> QuantizedSlots:
    """Round to 255 steps between ± the largest magnitude of each slot and head.

    The scales are float32; a slot of zeros has the scale zero.
    """
    slots = slots.astype(jnp.float32)
    scales = jnp.max(jnp.abs(slots), axis=-1) / 127
    steps = slots / jnp.where(scales == 0, 1, scales)[..., None]
    return QuantizedSlots(jnp.round(steps).astype(jnp.int8), scales)


def dequantize_slots(
    slots: Float[Array, "*K S H"] | QuantizedSlots, dtype: DTypeLike
) -> Float[Array, "*K S H"]:
    """The numbers themselves, in `dtype`; what is not quantized is only cast."""
    if isinstance(slots, QuantizedSlots):
        return (slots.values * slots.scales[..., None]).astype(dtype)
    return slots.astype(dtype)
