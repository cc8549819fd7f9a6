"""Patterns: how the axes of a tensor move, in a notation of einops's kind.

Names of axes, those that are laid out as one dimension in brackets:
`(N h two) D -> D (N two h)` takes a projection whose rotary pairs lie next to each
other to one where they lie half a head apart, and transposes it. Read from right to
left it is the exact inverse.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_ROWS = 128  # copied at a time; 64 to 256 do equally well, 16 and 1024 worse


def axes_shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one side of a pattern: `"(N h two) D"` to `(4096, 4096)`."""
    return tuple(math.prod(sizes[name] for name in group) for group in _groups(axes))


def reverse(pattern: str) -> str:
    """The pattern of the inverse change."""
    left, right = pattern.split(" -> ")
    return f"{right} -> {left}"


def is_plain(pattern: str) -> bool:
    """Whether nothing moves, so that an array is its own rearrangement."""
    left, right = pattern.split(" -> ")
    return _names(left) == _names(right)


def rearrange(
    pattern: str, array: np.ndarray, sizes: Mapping[str, int], dtype: Any = None
) -> np.ndarray:
    """The array with its axes moved, in `dtype` (its own where none is given).

    Where nothing moves and no dtype changes it is the array itself, not a copy.
    A few rows are read, cast and written at a time: NumPy's own transposing copy
    takes one element from each row in turn and is some eight times slower.
    """
    left, right = pattern.split(" -> ")
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    moved, final = _names(left), _names(right)
    if moved == final:
        return array.astype(dtype, copy=False).reshape(axes_shape(right, sizes))
    rows = array.reshape([sizes[name] for name in moved])
    out = np.empty([sizes[name] for name in final], dtype)
    # The target seen through the source's order of axes, and both as plain words,
    # which are copied faster than bfloat16 is.
    view = out.transpose([final.index(name) for name in moved])
    words = np.dtype(f"u{dtype.itemsize}")
    view = view.view(words)
    step = max(1, _ROWS // math.prod(rows.shape[1:-1]))
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].astype(dtype, copy=False)
        view[start : start + step] = block.view(words)
    return out.reshape(axes_shape(right, sizes))


def _names(axes: str) -> list[str]:
    return [name for group in _groups(axes) for name in group]


def _groups(axes: str) -> list[list[str]]:
    """`"(N h two) D"` to `[["N", "h", "two"], ["D"]]`."""
    return [part.strip("()").split() for part in re.findall(r"\([^()]*\)|\w+", axes)]
