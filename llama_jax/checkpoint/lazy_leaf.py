"""Lazily read weights, and trees of them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.finite import check_cast, check_finite
from llama_jax.config import LlamaConfig
from llama_jax.distributed import to_host
from llama_jax.errors import CheckpointError
from llama_jax.params import LAYERS, axes_of, flatten, leaf_paths, weight_shape
from llama_jax.types import Params

Progress = Callable[[str, int, int], None]
"""Called with an activity ("writing"), the bytes done so far, and the total."""

DTYPES: tuple[np.dtype, ...] = tuple(
    np.dtype(dtype) for dtype in (np.float32, np.float16, jnp.bfloat16)
)
"""The dtypes of weights on disk."""


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """A weight that is read on demand and not cached.

    Attributes:
      shape: of the array.
      dtype: of the array.
      read: reads or computes the array.
      host_bytes: upper bound on the host memory that `read` allocates, the array
        included; 0 for a view of a mapped file, whose pages the system can drop.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    host_bytes: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of the array in bytes."""
        return self.size * self.dtype.itemsize

    def with_host_bytes(self, host_bytes: int) -> "LazyLeaf":
        """The same leaf with another `host_bytes`."""
        return dataclasses.replace(self, host_bytes=host_bytes)

    def cast(self, dtype: np.dtype, where: object, name: str) -> "LazyLeaf":
        """The same leaf, cast to another dtype when it is read.

        Reading raises a `CheckpointError` if a number does not fit into that dtype.

        Args:
          dtype: of the new leaf.
          where: the file or model, for messages.
          name: of the weight.
        """
        if dtype == self.dtype:
            return self

        def read() -> np.ndarray:
            with np.errstate(over="ignore"):  # checked below
                array = self.read().astype(dtype)
            check_cast(array, where, name)
            return array

        return dataclasses.replace(
            self,
            dtype=dtype,
            read=read,
            host_bytes=self.host_bytes + self.size * dtype.itemsize,
        )

    def checked(self, where: object, name: str) -> "LazyLeaf":
        """The same leaf; reading NaN or infinity raises a `CheckpointError`.

        Args:
          where: the file or model, for messages.
          name: of the weight.
        """

        def read() -> np.ndarray:
            array = self.read()
            check_finite(array, where, name)
            return array

        return dataclasses.replace(self, read=read)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def lazy_leaves(params: Params) -> dict[str, LazyLeaf]:
    """Convert a tree to lazy leaves, one per layer and weight.

    Args:
      params: arrays or `LazyLeaf`s, in either layout, nested or flat.

    Returns:
      Leaves by path, in the unrolled layout.
    """
    leaves: dict[str, LazyLeaf] = {}
    for path, leaf in flatten(params).items():
        weight = path.removeprefix(LAYERS)
        if weight == path or weight.partition("/")[0].isdigit():
            leaves[path] = lazy_leaf(leaf)
            continue
        for layer in range(leaf.shape[0]):
            leaves[f"{LAYERS}{layer}/{weight}"] = lazy_leaf(leaf, layer)
    return leaves


def lazy_leaf(array: Any, layer: int | None = None) -> LazyLeaf:
    """An array, or one layer of a stacked array, as a lazy leaf."""
    if isinstance(array, LazyLeaf) and layer is None:
        return array
    shape = tuple(array.shape if layer is None else array.shape[1:])

    def read() -> np.ndarray:
        return np.asarray(to_host(array if layer is None else array[layer]))

    return LazyLeaf(shape, np.dtype(array.dtype), read)


def check_leaves(
    leaves: Mapping[str, LazyLeaf], config: LlamaConfig, *, where: object
) -> None:
    """Check that the leaves are exactly the weights of a configuration.

    Args:
      leaves: by path, one per layer and weight.
      config: of the model.
      where: the checkpoint's path or name, for messages.

    Raises:
      CheckpointError: a leaf is missing, unknown, or has another shape or dtype.
    """
    if config.num_layers > len(leaves):
        raise CheckpointError(
            f"{where}: the configuration has {config.num_layers} layers, but there are "
            f"only {len(leaves)} weights; the two do not belong together"
        )
    paths = set(leaf_paths(config))
    for problem, wrong in (
        ("lacks", paths - leaves.keys()),
        ("has the unknown weight", leaves.keys() - paths),
    ):
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise CheckpointError(
                f"{where}: {problem} {min(wrong)}{more}; the weights and the "
                "configuration do not belong together"
            )
    for path, leaf in leaves.items():
        shape = weight_shape(config, axes_of(path))
        if leaf.shape != shape:
            raise CheckpointError(
                f"{where}: {path} has shape {list(leaf.shape)}, but the configuration "
                f"requires {list(shape)}; the two do not belong together"
            )
        if leaf.dtype not in DTYPES:
            raise CheckpointError(
                f"{where}: {path} has dtype {leaf.dtype}; cast it to float32, bfloat16 "
                "or float16"
            )
