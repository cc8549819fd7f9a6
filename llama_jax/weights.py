"""Weights that are no plain array: quantized and adapted ones, as leaves of the tree.

`linear` multiplies with them as they are held: four or eight bits become numbers within
the product, and an adapter's is added to its base's. So a program's arguments are what
is held, and no whole weight is ever made of it.

Axes: I inputs, O outputs, R an adapter's rank, and C groups of inputs that share a
scale. Layers may be stacked in front of them all.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from llama_jax.types import Array, Float, Int

Kind = Literal["int8", "int4", "nf4"]

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What the sixteen codes of four-bit normal floats mean (arXiv:2305.14314, E)."""


class _Leaf:
    """A weight of several arrays, which behaves as the one that it stands for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [I, O], layers in front where they are stacked."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """How many axes the weight has."""
        return len(self.shape)

    def __getitem__(self, layer: Any) -> Any:
        """One layer of a stacked weight."""
        return jax.tree.map(lambda array: array[layer], self)

    __iter__ = None  # Python would count on without an end: arrays clamp an index


@dataclasses.dataclass(frozen=True)
class Quantized(_Leaf):
    """A weight in few bits; what all kinds have."""

    values: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [I, O], layers in front where they are stacked."""
        return tuple(self.values.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """Eight bits, a float32 scale for each output: column o is `scales[o] · values`.

    The scale is applied behind the product.
    """

    values: Int[Array, "*L I O"]
    scales: Float[Array, "*L O"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4(Quantized):
    """Four bits from -7 to 7, a scale for each output and each group of inputs."""

    values: Int[Array, "*L I O"]
    scales: Float[Array, "*L C O"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Quantized):
    """Four-bit normal floats: codes into `NF4_LEVELS`, a scale for each group."""

    values: Int[Array, "*L I O"]
    scales: Float[Array, "*L C O"]


KINDS: dict[Kind, type[Int8] | type[Int4] | type[NF4]] = {
    "int8": Int8,
    "int4": Int4,
    "nf4": NF4,
}
"""The leaf type of every kind of quantization."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(_Leaf):
    """A weight that stays, and a low-rank one that is trained (arXiv:2106.09685).

    It stands for `base + scaling · a @ b`, which is never computed as such.
    """

    base: Any
    a: Float[Array, "*L I R"]
    b: Float[Array, "*L R O"]
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base: [I, O], layers in front where they are stacked."""
        return tuple(self.base.shape)


Weight: TypeAlias = Array | Quantized | Adapted
"""What `linear` multiplies with."""


def group_size(inputs: int, group: int) -> int:
    """How many of so many inputs share a scale: their largest divisor up to `group`."""
    return next(size for size in range(min(group, inputs), 0, -1) if not inputs % size)


def values_in(weight: Quantized, dtype: DTypeLike) -> Float[Array, "*L I O"]:
    """The numbers that the bits mean, before any scale."""
    if isinstance(weight, NF4):
        return _nf4_numbers(weight.values, dtype)
    return weight.values.astype(dtype)


def dequantize(weight: Quantized, dtype: DTypeLike) -> Float[Array, "*L I O"]:
    """The whole weight. In a program it is for a product alone, which it fuses with."""
    values, scales = values_in(weight, dtype), weight.scales.astype(dtype)
    if isinstance(weight, Int8):
        return values * scales[..., None, :]
    # Multiplied in the dtype of the product, that is: the TPU compiler of jax 0.7 makes
    # a whole array of float32 scales, but none of bfloat16 ones.
    *layers, groups, outputs = scales.shape
    grouped = values.reshape(*layers, groups, -1, outputs)
    return (grouped * scales[..., None, :]).reshape(values.shape)


def _nf4_numbers(codes: Array, dtype: DTypeLike) -> Array:
    """The levels of codes, by choosing between two at each of four bits.

    15 selections per number, which every compiler fuses into the product. A look-up in
    a table is a gather, which TPUs do one number at a time, into a whole array.
    """
    bits = codes.astype(jnp.int32)
    left = [jnp.asarray(level, dtype) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (bits & (1 << bit)) != 0
        pairs = zip(left[::2], left[1::2], strict=True)
        left = [jnp.where(is_set, one, zero) for zero, one in pairs]
    return left[0]
