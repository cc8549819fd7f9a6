"""Memory-mapped leaves."""

import pathlib
from collections.abc import Sequence

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


def empty_tensor(
    path: pathlib.Path, name: str, shape: Sequence[int]
) -> CheckpointError:
    """Return the error for a tensor without numbers."""
    return CheckpointError(
        f"{path}: {name} of shape {list(shape)} has no numbers, as DeepSpeed ZeRO-3 "
        "saves what it has not gathered; save it again with "
        "stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py in the "
        "training checkpoint"
    )
