"""Measure what this machine can do: memory bandwidth, and FLOP/s of matrix products."""

import dataclasses
import datetime
import functools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.kernels.precision import matmul_precision
from llama_jax.runtime import DType
from llama_jax.types import Array, PyTree

_GIB = 1 << 30
_RUN_SECONDS = 0.1
_MAX_CALLS_PER_RUN = 64
_CPU_SQUARES = (1024, 2048)
_ACCELERATOR_SQUARES = (2048, 4096, 8192)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and when something was measured."""

    device: str
    host: str
    jax: str
    date: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """GB/s (10⁹ bytes) of three ways to stream 1 GiB of warm memory."""

    reduction: float
    matvec: float
    copy: float

    @property
    def best(self) -> float:
        """The highest of the three."""
        return max(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulRate:
    """The fastest matrix product of several sizes; `I,J,K` is `[I, J] @ [J, K]`."""

    gflops: float
    size: str


def describe_machine() -> Machine:
    """Describe the default device and the versions."""
    device = jax.devices()[0]
    host = f"{platform.machine()}, {platform.system()}, Python "
    return Machine(
        device=f"{device.platform}: {device.device_kind}",
        host=host + platform.python_version(),
        jax=jax.__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def time_calls(
    run: Callable[[], PyTree], *, repeats: int = 8, warmup: int = 2
) -> list[float]:
    """Measure the seconds of `repeats` calls, after others that compile and warm up.

    A call ends when the arrays that it returns are computed.
    """
    for _ in range(warmup):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times


def best_and_median(times: Iterable[float]) -> tuple[float, float]:
    """The minimum and the median."""
    times = list(times)
    return min(times), statistics.median(times)


def measure_bandwidth(size: int = _GIB, repeats: int = 8) -> Bandwidth:
    """Measure the memory bandwidth of the default device with all its cores.

    Args:
      size: bytes to stream.
      repeats: measurements of each way, of which the best counts.
    """
    columns = 8192
    memory = jnp.ones((size // 4 // columns, columns), jnp.float32)
    nbytes = memory.nbytes
    # Two ways to sum, to one number and to one per row: compilers differ in which of
    # them uses all cores.
    total = time_calls(lambda: _total(memory), repeats=repeats)
    per_row = time_calls(lambda: _row_sums(memory), repeats=repeats)
    vector = jnp.ones((1, len(memory)), jnp.float32)
    matvec = time_calls(lambda: _product(vector, memory), repeats=repeats)
    target = jnp.zeros_like(memory)

    def copy() -> Array:
        # Into existing memory, else the allocation of new pages would be measured.
        nonlocal target
        target = _copy(target, memory)
        return target

    copied = time_calls(copy, repeats=repeats)
    return Bandwidth(
        reduction=nbytes / min(total + per_row) / 1e9,
        matvec=nbytes / min(matvec) / 1e9,
        copy=2 * nbytes / min(copied) / 1e9,
    )


def measure_matmul_rate(
    config: LlamaConfig, tokens: int, dtype: DType, repeats: int = 5
) -> MatmulRate:
    """Measure products of square matrices and of the model's shapes; return the best.

    Args:
      config: model whose projections are measured.
      tokens: rows of their left-hand side.
      dtype: of both sides; float32 products have full float32 precision.
      repeats: measurements of each size.
    """
    on_cpu = jax.default_backend() == "cpu"
    squares = _CPU_SQUARES if on_cpu else _ACCELERATOR_SQUARES
    width, hidden = config.embed_dim, config.mlp_dim
    sizes = [(n, n, n) for n in squares]
    sizes += [(tokens, width, width), (tokens, width, hidden), (tokens, hidden, width)]
    fastest = MatmulRate(gflops=0.0, size="")
    for size in sizes:
        left = jnp.ones(size[:2], dtype)
        right = jnp.ones(size[1:], dtype)
        product = functools.partial(_product, left, right)
        # Runs are about as long as what is compared with them: shorter ones would more
        # easily meet a moment in which nothing else uses the machine.
        calls = math.ceil(_RUN_SECONDS / min(time_calls(product, repeats=2)))
        calls = min(calls, _MAX_CALLS_PER_RUN)

        def run(product: Callable[[], Array] = product, calls: int = calls) -> Array:
            for _ in range(calls - 1):
                product()
            return product()

        times = time_calls(run, repeats=repeats, warmup=0)
        rate = 2 * math.prod(size) * calls / min(times) / 1e9
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
    # An addition, since a plain copy would be compiled to nothing.
    return source + 1
