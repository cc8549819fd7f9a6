"""Times of attention on this machine's device, next to what the device can do."""

import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from llama_jax import kernels
from llama_jax.bench.attention_work import (
    Argument,
    Call,
    Work,
    causal_shapes,
    with_gradient,
)
from llama_jax.bench.jax_kernels import jax_kernels
from llama_jax.bench.machine import (
    best_and_median,
    measure_bandwidth,
    measure_matmul_rate,
    time_calls,
)
from llama_jax.model.presets import PRESETS
from llama_jax.runtime import DType
from llama_jax.types import Array, JsonObject, PyTree

TimedCall: TypeAlias = Callable[[], PyTree]
"""A call without arguments, which returns arrays."""


def measure_times(works: Sequence[tuple[str, Work]], repeats: int = 8) -> JsonObject:
    """Time every implementation on every work, and measure the machine's rates.

    If an implementation raises an error, it is reported as refused.

    Args:
      works: works, each with its shape's name.
      repeats: measurements of each.
    """
    dtype: DType = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    on_cpu = jax.default_backend() == "cpu"
    memory = measure_bandwidth(1 << 26 if on_cpu else 1 << 30)
    product = measure_matmul_rate(PRESETS["llama2-7b"], 16 if on_cpu else 4096, dtype)
    rows = []
    for shape, work in works:
        for name, call in _implementations(work, dtype):
            row = {"shape": shape, **work.describe(), "name": name}
            try:
                _, median = best_and_median(time_calls(call(), repeats=repeats))
            except Exception as error:  # implementations raise all kinds of errors
                reason = (str(error).strip().splitlines() or [""])[0][:200]
                rows.append({**row, "refused": f"{type(error).__name__}: {reason}"})
                continue
            part = _fraction(work, median, product.gflops, memory.copy, dtype)
            rows.append({**row, "median_seconds": median, "part": part})
    rates = {"matmul_gflops": product.gflops, "copy_gb_per_s": memory.copy}
    return {"dtype": dtype, **rates, "rows": rows}


def flops(work: Work) -> int:
    """Count the FLOPs of the visible products: two forward, five backward."""
    pairs = work.rows * work.heads.n * work.length * (work.length + 1) // 2
    return pairs * work.heads.h * 2 * (7 if work.kind == "backward" else 2)


def _fraction(
    work: Work, median: float, gflops: float, copy: float, dtype: str
) -> float:
    """Fraction of the matrix product rate, or for decoding of the copy rate.

    The backward pass includes the forward pass that it needs, in time and FLOPs.
    """
    if work.kind == "decode":
        size = jnp.dtype(dtype).itemsize
        cache = 2 * size * work.rows * work.heads.k * work.length * work.heads.h
        return cache / median / 1e9 / copy
    return flops(work) / median / 1e9 / gflops


def _implementations(
    work: Work, dtype: DType
) -> list[tuple[str, Callable[[], TimedCall]]]:
    """The name of each implementation, and what prepares a call; ours first."""
    implementations: list[tuple[str, Callable[[], TimedCall]]] = []
    for name in typing.get_args(kernels.Implementation):
        if name != "auto":
            attend = functools.partial(kernels.attention, implementation=name)
            implementations.append(
                (name, functools.partial(_prepare, work, dtype, attend))
            )
    if jax.default_backend() == "gpu":
        prepare = functools.partial(_prepare, work, dtype, _cudnn)
        implementations.append(("jax.nn cudnn", prepare))
    if jax.default_backend() == "tpu" and dtype == "bfloat16":
        for kernel in jax_kernels(work, _chip(), sweep=False):
            prepare = functools.partial(_prepare_call, kernel.build)
            implementations.append((f"{kernel.name} {kernel.tile}", prepare))
    return implementations


def _chip() -> str:
    kind = jax.devices()[0].device_kind
    return "v6e" if "v6" in kind else "v5e"


def _prepare(work: Work, dtype: DType, attend: Callable[..., Array]) -> TimedCall:
    n, _, h = work.heads
    shapes = [jax.ShapeDtypeStruct(x.shape, dtype) for x in causal_shapes(work)]
    if work.kind == "decode":
        shapes[0] = jax.ShapeDtypeStruct((work.rows, n, 1, h), dtype)
    last = jnp.full((work.rows,), work.length - 1, jnp.int32)
    start = last if work.kind == "decode" else None

    def transposed(q: Array, k: Array, v: Array) -> Array:
        return attend(q.swapaxes(1, 2), k, v, q_start=start).swapaxes(1, 2)

    return _call(with_gradient(work, transposed), shapes)


def _prepare_call(build: Callable[[], Call]) -> TimedCall:
    return _call(*build())


def _call(function: Callable[..., PyTree], arguments: Sequence[Argument]) -> TimedCall:
    keys = jax.random.split(jax.random.key(0), len(arguments))
    arrays = [
        jax.random.normal(key, x.shape, x.dtype)
        if isinstance(x, jax.ShapeDtypeStruct)
        else jnp.asarray(x)
        for key, x in zip(keys, arguments, strict=True)
    ]
    return functools.partial(jax.jit(function), *arrays)


def _cudnn(q: Array, k: Array, v: Array, *, q_start: Array | None) -> Array:
    lengths = None if q_start is None else q_start + 1
    return jax.nn.dot_product_attention(
        q,
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        is_causal=q_start is None,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def time_lines(times: JsonObject) -> Iterator[str]:
    """The table: times, speedup over XLA, and fraction of the device's rate."""
    yield f"matrix product {times['matmul_gflops']:,.0f} GFLOP/s ({times['dtype']})"
    yield f"copy {times['copy_gb_per_s']:,.0f} GB/s"
    xla: dict[tuple[object, ...], float] = {}
    for row in times["rows"]:
        work = (row["kind"], row["shape"], row["length"], row["rows"])
        label = "{} {}, length {}, {} rows".format(*work) + f": {row['name']:<30}"
        if "refused" in row:
            yield f"{label} refused: {row['refused'][:80]}"
            continue
        median = row["median_seconds"]
        if row["name"] == "xla":
            xla[work] = median
        ratio = f"{xla[work] / median:.2f} x xla" if work in xla else ""
        limit = "copy" if row["kind"] == "decode" else "matmul"
        part = f"{row['part']:.0%} of {limit}"
        yield f"{label} {median * 1e3:,.3f} ms  {ratio}  {part}"
