"""What this machine can do: memory bandwidth, and the rate of matrix products."""

import dataclasses
import datetime
import functools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.model.linear import matmul_precision
from llama_jax.runtime import DType
from llama_jax.types import Array

_GIB = 1 << 30
_RUN_SECONDS = 0.1
_MOST_IN_A_ROW = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and when a figure was measured."""

    device: str
    host: str
    jax: str
    date: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """GB/s (10⁹ bytes) of three ways to go through 1 GiB of warm memory."""

    reduction: float
    matvec: float
    copy: float

    @property
    def best(self) -> float:
        """The highest of the three."""
        return max(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulRate:
    """The fastest matrix product of several sizes, `I,J,K` being `[I, J] @ [J, K]`."""

    gflops: float
    size: str


def describe() -> Machine:
    """The default device and the versions."""
    device = jax.devices()[0]
    host = f"{platform.machine()}, {platform.system()}, Python "
    return Machine(
        device=f"{device.platform}: {device.device_kind}",
        host=host + platform.python_version(),
        jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def seconds(run: Callable[[], Any], *, repeats: int = 8, warm: int = 2) -> list[float]:
    """How long each of `repeats` calls took, after some that compile and warm up.

    `run` returns arrays; a call ends when they are computed.
    """
    for _ in range(warm):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times


def best_and_median(times: Iterable[float]) -> tuple[float, float]:
    """The shortest, and the middle one."""
    times = list(times)
    return min(times), statistics.median(times)


def bandwidth(size: int = _GIB, repeats: int = 8) -> Bandwidth:
    """Memory bandwidth of the default device with all its cores, best of the repeats.

    Args:
      size: bytes to go through.
      repeats: how often each is measured.
    """
    columns = 8192
    memory = jnp.ones((size // 4 // columns, columns), jnp.float32)
    nbytes = memory.nbytes
    # Two ways to sum: to one number, and to one per row. Which one is spread over all
    # cores differs between compilers.
    total = seconds(lambda: _total(memory), repeats=repeats)
    per_row = seconds(lambda: _row_sums(memory), repeats=repeats)
    vector = jnp.ones((1, len(memory)), jnp.float32)
    matvec = seconds(lambda: _product(vector, memory), repeats=repeats)
    target = jnp.zeros_like(memory)

    def copy() -> Array:
        # Into memory that is there already: new pages would be measured otherwise.
        nonlocal target
        target = _copy(target, memory)
        return target

    copied = seconds(copy, repeats=repeats)
    return Bandwidth(
        reduction=nbytes / min(total + per_row) / 1e9,
        matvec=nbytes / min(matvec) / 1e9,
        copy=2 * nbytes / min(copied) / 1e9,
    )


def matmul_rate(
    config: LlamaConfig, tokens: int, dtype: DType, repeats: int = 5
) -> MatmulRate:
    """The fastest product of square matrices, or of the model's own shapes.

    Args:
      config: whose projections are tried.
      tokens: rows of their left-hand side.
      dtype: of both sides; float32 products are real float32 ones.
      repeats: how often each is measured.
    """
    squares = (1024, 2048) if jax.default_backend() == "cpu" else (2048, 4096, 8192)
    width, hidden = config.embed_dim, config.mlp_dim
    sizes = [(n, n, n) for n in squares]
    sizes += [(tokens, width, width), (tokens, width, hidden), (tokens, hidden, width)]
    fastest = MatmulRate(gflops=0.0, size="")
    for size in sizes:
        left = jnp.ones(size[:2], dtype)
        right = jnp.ones(size[1:], dtype)
        product = functools.partial(_product, left, right)
        # In runs about as long as what is compared with them: a shorter one would find
        # a moment when nothing else uses the machine more easily.
        in_a_row = math.ceil(_RUN_SECONDS / min(seconds(product, repeats=2)))
        in_a_row = min(in_a_row, _MOST_IN_A_ROW)

        def run(product: Callable[[], Array] = product, times: int = in_a_row) -> Array:
            for _ in range(times - 1):
                product()
            return product()

        times = seconds(run, repeats=repeats, warm=0)
        rate = 2 * math.prod(size) * in_a_row / min(times) / 1e9
        if rate > fastest.gflops:
            fastest = MatmulRate(gflops=rate, size=",".join(map(str, size)))
    return fastest


@jax.jit
def _total(x: Array) -> Array:
    return jnp.sum(x)


@jax.jit
def _row_sums(x: Array) -> Array:
    return jnp.sum(x, axis=1)


@jax.jit
def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision=matmul_precision(left.dtype))


@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def _copy(target: Array, source: Array) -> Array:
    # An addition, since a bare copy would be compiled to no work at all.
    return source + 1
