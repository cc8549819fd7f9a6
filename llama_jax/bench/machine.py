"""What this machine can do at best: its memory bandwidth and its matrix products."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.linear import matmul_precision

_GIBIBYTE = 1 << 30


class Bandwidth(NamedTuple):
    """Bytes per second of three ways to stream memory, each at its best."""

    reduction: float
    matvec: float
    copy: float

    @property
    def highest(self) -> float:
        """The highest of them."""
        return max(self)


def best_seconds(function: Callable[[], Any], repeats: int) -> float:
    """The shortest of some runs, after one that is not counted (it may compile)."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - began)
    return min(times)


def memory_bandwidth(repeats: int = 10) -> Bandwidth:
    """Measure a reduction, a matrix-vector product and a copy of 1 GiB of float32.

    A copy moves its bytes twice: it reads and writes them.
    """
    rows, columns = 1 << 15, 1 << 13
    matrix = jnp.ones((rows, columns), jnp.float32)
    assert matrix.nbytes == _GIBIBYTE
    vector = jnp.ones((rows,), jnp.float32)
    total = jax.jit(jnp.sum)
    # The way a projection reads its weights, precision included.
    product = jax.jit(
        lambda v, m: jnp.matmul(v, m, precision=matmul_precision(jnp.float32))
    )
    copied = jax.jit(jnp.copy)
    return Bandwidth(
        reduction=_GIBIBYTE / best_seconds(lambda: total(matrix), repeats),
        matvec=_GIBIBYTE / best_seconds(lambda: product(vector, matrix), repeats),
        copy=2 * _GIBIBYTE / best_seconds(lambda: copied(matrix), repeats),
    )


def matmul_rate(
    dtype: str, shapes: list[tuple[int, int, int]], repeats: int = 5
) -> float:
    """The highest rate, in FLOP/s, of some matrix products.

    Args:
      dtype: of both factors.
      shapes: (m, k, n) of products of m by k with k by n matrices.
      repeats: runs of each, of which the fastest counts.
    """
    precision = matmul_precision(dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    rates = []
    for m, k, n in shapes:
        a, b = jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)
        rates.append(2 * m * k * n / best_seconds(lambda: product(a, b), repeats))  # noqa: B023
    return max(rates)
