"""Random orders and numbers that are pure functions of their keys.

So a stream can continue from any position, without memory in proportion to the data.
Unlike NumPy's generators, they never change between versions.
"""

import numpy as np

_ROUNDS = 8


def shuffled(first: int, last: int, size: int, *, key: tuple[int, ...]) -> np.ndarray:
    """Elements `first` to `last` (excluded) of a random permutation of `size` numbers.

    A Feistel network permutes the numbers of an even number of bits; those outside
    `size` go through it again until they are inside.

    Args:
      first: index of the first element.
      last: index after the last element, at most `size`.
      size: at most 2^62.
      key: decides the permutation.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = np.uint64((1 << half) - 1)
    keys = [_key(*key, i) for i in range(_ROUNDS)]
    numbers = np.arange(first, last, dtype=np.uint64)
    outside = np.arange(len(numbers))
    while len(outside):
        left, right = numbers[outside] >> np.uint64(half), numbers[outside] & low
        for k in keys:
            left, right = right, left ^ (_mix(right + k) & low)
        numbers[outside] = left << np.uint64(half) | right
        outside = outside[numbers[outside] >= size]
    return numbers.astype(np.int64)


def draws(count: int, *key: int) -> list[float]:
    """Draw `count` numbers, uniform in [0, 1)."""
    bits = _mix(np.arange(1, count + 1, dtype=np.uint64) + _key(*key))
    return [float(number) / 2**53 for number in bits >> np.uint64(11)]


def _key(*parts: int) -> np.uint64:
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key + np.uint64(part % (1 << 64)))
    return np.uint64(key[0])


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every other."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
