"""Axis patterns: how the axes of a tensor move, in a notation like that of einops.

In `(N h two) D -> D (N two h)` every name is an axis, and parentheses join axes into
one dimension. This pattern takes interleaved rotary pairs to the half-split layout and
transposes. The reversed pattern is the exact inverse.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

_ROWS_PER_COPY = 128  # 64 to 256 are equally fast, 16 and 1024 are slower


def axes_shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of one side of a pattern: `"(N h two) D"` to `(4096, 4096)`."""
    return tuple(math.prod(sizes[name] for name in group) for group in _groups(axes))


def reverse(pattern: str) -> str:
    """Return the inverse pattern."""
    left, right = pattern.split(" -> ")
    return f"{right} -> {left}"


def moves_nothing(pattern: str) -> bool:
    """Return whether a pattern leaves the order of all axes as it is."""
    left, right = pattern.split(" -> ")
    return _names(left) == _names(right)


def rearrange(
    pattern: str,
    array: np.ndarray,
    sizes: Mapping[str, int],
    dtype: np.dtype | None = None,
) -> np.ndarray:
    """Move the axes of an array and cast it.

    Reads, casts and writes a few rows at a time: NumPy's transposing copy takes one
    element from each row in turn and is about eight times slower.

    Args:
      pattern: from the array's axes to those of the result.
      array: shape `axes_shape(left side, sizes)`.
      sizes: length of every axis name.
      dtype: of the result; defaults to the array's.

    Returns:
      The array itself, not a copy, if neither axes nor dtype change.
    """
    left, right = pattern.split(" -> ")
    dtype = array.dtype if dtype is None else dtype
    source_axes, target_axes = _names(left), _names(right)
    if source_axes == target_axes:
        return array.astype(dtype, copy=False).reshape(axes_shape(right, sizes))
    rows = array.reshape([sizes[name] for name in source_axes])
    result = np.empty([sizes[name] for name in target_axes], dtype)
    # Written in the source's axis order, and as unsigned integers, which NumPy copies
    # faster than bfloat16.
    words = np.dtype(f"u{dtype.itemsize}")
    target = result.transpose([target_axes.index(name) for name in source_axes])
    target = target.view(words)
    step = max(1, _ROWS_PER_COPY // math.prod(rows.shape[1:-1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].astype(dtype, copy=False)
        target[start : start + step] = block.view(words)
    return result.reshape(axes_shape(right, sizes))


def _names(axes: str) -> list[str]:
    return [name for group in _groups(axes) for name in group]


def _groups(axes: str) -> list[list[str]]:
    """Parse `"(N h two) D"` into `[["N", "h", "two"], ["D"]]`."""
    return [part.strip("()").split() for part in re.findall(r"\([^()]*\)|\w+", axes)]
