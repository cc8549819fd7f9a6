"""Weights that are not plain arrays: quantized and adapted ones, leaves of the tree.

`linear` multiplies with them as they are stored: bits become numbers inside the
product, and an adapter's product is added to its base's. So a program's arguments are
what is stored, and no whole weight is ever computed from it.

Axes: I inputs, O outputs, R the rank of an adapter, C groups of inputs that share a
scale. Stacked layers are an axis before them all.
"""

import dataclasses
from typing import Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from llama_jax.types import Array, Float, PyTree

Kind = Literal["int8", "int4", "nf4"]

GROUP_SIZE = 64
"""Inputs that share a scale in four bits: a block of QLoRA (arXiv:2305.14314)."""

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
"""Numbers of the sixteen codes of four-bit normal floats (arXiv:2305.14314, E)."""


_SomeLeaf = TypeVar("_SomeLeaf", bound="_Leaf")


class _Leaf:
    """A weight of several arrays with the shape of the weight that it stands for.

    Its fields are arrays, or their shapes or shardings.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [I, O], after a layer axis if layers are stacked."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    def __getitem__(self: _SomeLeaf, layer: int | Array) -> _SomeLeaf:
        """One layer of a stacked weight."""
        return jax.tree.map(lambda array: array[layer], self)

    __iter__ = None  # otherwise Python iterates by index, which arrays clamp: forever


@dataclasses.dataclass(frozen=True)
class Quantized(_Leaf):
    """A weight in few bits, of any kind.

    Attributes:
      values: integers or codes, [*L, I, O].
      scales: what they are multiplied by, per output or group of inputs.
    """

    values: PyTree
    scales: PyTree

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: [I, O], after a layer axis if layers are stacked."""
        return tuple(self.values.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """Eight bits; float32 scales [*L, O], applied after the product."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int4(Quantized):
    """Four bits, from -7 to 7; scales [*L, C, O]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Quantized):
    """Four-bit normal floats: codes into `NF4_LEVELS`; scales [*L, C, O]."""


KINDS: dict[Kind, type[Int8] | type[Int4] | type[NF4]] = {
    "int8": Int8,
    "int4": Int4,
    "nf4": NF4,
}
"""The leaf type of each kind of quantization."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(_Leaf):
    """A frozen weight with a trained low-rank one beside it (arXiv:2106.09685).

    It stands for `base + scaling · a @ b`, which is never computed as such.

    Attributes:
      base: plain or quantized.
      a: [*L, I, R].
      b: [*L, R, O].
      scaling: of the product of a and b.
    """

    base: PyTree
    a: PyTree
    b: PyTree
    scaling: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the base: [I, O], after a layer axis if layers are stacked."""
        return tuple(self.base.shape)


Weight: TypeAlias = Array | Quantized | Adapted
"""What `linear` multiplies with."""


def group_size(inputs: int, group: int = GROUP_SIZE) -> int:
    """Inputs per scale: the largest divisor of `inputs` up to `group`."""
    return next(size for size in range(min(group, inputs), 0, -1) if not inputs % size)


def values_in(weight: Quantized, dtype: DTypeLike) -> Float[Array, "*L I O"]:
    """Convert the bits to numbers, before any scale."""
    if isinstance(weight, NF4):
        return _nf4_numbers(weight.values, dtype)
    return weight.values.astype(dtype)


def dequantize(weight: Quantized, dtype: DTypeLike) -> Float[Array, "*L I O"]:
    """Compute the whole weight; in a program only for a product, which fuses it."""
    values, scales = values_in(weight, dtype), weight.scales.astype(dtype)
    if isinstance(weight, Int8):
        return values * scales[..., None, :]
    # Multiplied in the dtype of the product: the TPU compiler of jax 0.7 materializes
    # float32 scales of the whole weight, but not bfloat16 ones.
    *layers, groups, outputs = scales.shape
    grouped = values.reshape(*layers, groups, -1, outputs)
    return (grouped * scales[..., None, :]).reshape(values.shape)


def _nf4_numbers(codes: Array, dtype: DTypeLike) -> Array:
    """Look up levels by choosing between two at each of four bits.

    15 selections per number, which every compiler fuses into the product. A look-up in
    a table is a gather, which TPUs do one number at a time, into a whole array.
    """
    bits = codes.astype(jnp.int32)
    levels = [jnp.asarray(level, dtype) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (bits & (1 << bit)) != 0
        pairs = zip(levels[::2], levels[1::2], strict=True)
        levels = [jnp.where(is_set, high, low) for low, high in pairs]
    return levels[0]
