"""Memory-mapped leaves, and the range check of float16."""

import pathlib

import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.errors import CheckpointError


def mapped_leaf(
    path: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> LazyLeaf:
    """Return a leaf that memory-maps its bytes of a file when it is read.

    Args:
      path: the file.
      dtype: of the numbers in it.
      shape: of the array.
      offset: of its first byte; the caller has checked that all bytes are there.
    """

    def read() -> np.ndarray:
        return np.asarray(np.memmap(path, dtype, "r", offset, shape))

    return LazyLeaf(shape, dtype, read)


def check_float16_range(array: np.ndarray, where: object, name: str) -> None:
    """Raise a `CheckpointError` if a cast to float16 gave infinities or NaNs.

    Args:
      array: the result of the cast.
      where: the file or model, for the message.
      name: of the tensor.
    """
    if not np.isfinite(array).all():
        raise CheckpointError(
            f"{where}: {name} does not fit into float16 (largest value 65504); convert "
            "to bfloat16 or float32"
        )
