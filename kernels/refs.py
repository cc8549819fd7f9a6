"""Types of the values inside Pallas kernels.

Importing this module does not import Pallas.
"""

from typing import Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array

Scalar: TypeAlias = Array | int
"""An integer or a boolean, known when the kernel is traced or only when it runs."""


@runtime_checkable
class _At(Protocol):
    def __getitem__(self, index: object, /) -> "Ref": ...


@runtime_checkable
class Ref(Protocol):
    """A reference to memory (or to semaphores) that a kernel reads and writes.

    `jax.Ref` is this type at newer versions of jax, and other references at 0.7.2.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the array."""

    @property
    def at(self) -> _At:
        """References to parts: `ref.at[index]`."""

    def __getitem__(self, index: object, /) -> Array:
        """Read a part."""

    def __setitem__(self, index: object, value: Array | float, /) -> None:
        """Write a part."""


@runtime_checkable
class AsyncCopy(Protocol):
    """A copy between memories, as `pltpu.make_async_copy` returns it."""

    def start(self) -> None:
        """Start the copy."""

    def wait(self) -> None:
        """Wait until it is done."""
