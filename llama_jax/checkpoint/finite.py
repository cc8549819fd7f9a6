"""Find weights that are not numbers: NaN, or infinity after an overflow."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.distributed import to_host
from llama_jax.errors import CheckpointError
from llama_jax.params import LAYERS
from llama_jax.types import Array, Params

# Bits of the exponent, all of which are set in NaN and infinity and nowhere else.
_EXPONENTS: dict[np.dtype, int] = {
    np.dtype(np.float32): 0x7F80_0000,
    np.dtype(jnp.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
}
_CHUNK = 1 << 16  # numbers that are tested at a time, which a cache holds


def all_finite(array: np.ndarray) -> bool:
    """Whether no number of a floating-point array is NaN or infinite."""
    exponent = _EXPONENTS[array.dtype]
    words = np.atleast_1d(array.view(f"u{array.dtype.itemsize}"))
    step = max(1, _CHUNK * words.shape[0] // max(words.size, 1))
    return all(
        (words[start : start + step] & exponent).max() != exponent
        for start in range(0, words.shape[0], step)
    )


def check_finite(array: np.ndarray, where: object, name: str) -> None:
    """Raise a `CheckpointError` that names a weight with NaN or infinity.

    Args:
      array: the weight.
      where: the file or model, for the message.
      name: of the weight.
    """
    if all_finite(array):
        return
    bad = np.argwhere(~np.isfinite(array))
    raise CheckpointError(
        f"{where}: {name} has {len(bad):,} of {array.size:,} numbers that are NaN or "
        f"infinite, the first at {bad[0].tolist()}; download the checkpoint again, or "
        "use an earlier one"
    )


def check_cast(array: np.ndarray, where: object, name: str) -> None:
    """Raise a `CheckpointError` if a cast of finite numbers gave infinities.

    Args:
      array: the result of the cast.
      where: the file or model, for the message.
      name: of the weight.
    """
    if not all_finite(array):
        others = "float32" if array.dtype != np.float16 else "bfloat16 or float32"
        raise CheckpointError(
            f"{where}: {name} does not fit into {array.dtype} (largest value "
            f"{float(jnp.finfo(array.dtype).max):.6g}); convert to {others}"
        )


def find_non_finite(params: Params) -> str | None:
    """The path of the first weight with NaN or infinity; None if all are finite.

    Args:
      params: tree of arrays, quantized and adapted weights, in either layout.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for keys, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        bad = np.atleast_1d(to_host(_has_non_finite(leaf)))
        if not bad.any():
            continue
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        weight = path.removeprefix(LAYERS)
        if weight == path or weight.partition("/")[0].isdigit():
            return path
        return f"{LAYERS}{np.flatnonzero(bad)[0]}/{weight}"  # layers are stacked
    return None


@jax.jit
def _has_non_finite(leaf: Array) -> Array:
    """Whether each index of the first axis has NaN or infinity."""
    return ~jnp.isfinite(leaf).all(axis=tuple(range(1, leaf.ndim)))
