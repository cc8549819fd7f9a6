"""Every GPU implementation against the reference, on a GPU.

`JAX_PLATFORMS=cuda pytest -n 0 -m gpu tests/kernels/test_on_gpu.py`
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_inputs import (
    arrays,
    assert_equal,
    inputs_with_gradient,
    quantized,
    wide,
    with_gradient,
)
from support.gpus import assert_close, pages_of, program, run

from llama_jax.kernels import reference
from llama_jax.kernels.gpu import cudnn, decode_triton, flash_mosaic, flash_triton

pytestmark = pytest.mark.gpu

FLASH: dict[str, Callable[..., Any]] = {
    "triton": flash_triton.flash_attention,
    "mosaic_gpu": flash_mosaic.flash_attention,
    "cudnn": cudnn.cudnn_attention,
}
every_flash = pytest.mark.parametrize("name", FLASH)


@pytest.fixture(autouse=True)
def capability() -> tuple[int, ...]:
    """Compute capability of the GPU; skips tests without a suitable GPU."""
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU, or JAX_PLATFORMS excludes it")
    version = tuple(map(int, jax.devices()[0].compute_capability.split(".")))
    if version < (8, 0):
        pytest.skip(f"compute capability {version}: the kernels need Ampere")
    return version


def flash_on(name: str, capability: tuple[int, ...]) -> Callable[..., Any]:
    if name == "mosaic_gpu" and capability[0] != 9:
        pytest.skip("the Mosaic GPU kernel needs Hopper")
    return FLASH[name]


def compare(
    attend: Callable[..., Any],
    shape: Any,
    dtype: str,
    *,
    gradient: bool,
    **settings: Any,
) -> None:
    """Two runs for B T N K S H are equal, and close to the reference in float32."""
    inputs = inputs_with_gradient(shape, dtype)
    exact: Callable[..., Any] = reference.attention
    if gradient:
        attend = with_gradient(attend, **settings)
        exact = with_gradient(exact, **settings)
    else:
        inputs, attend = inputs[:3], functools.partial(attend, **settings)
        exact = functools.partial(exact, **settings)
    compiled = program(attend, *inputs)
    first = compiled(*inputs)
    assert_equal(compiled(*inputs), first)
    assert_close(first, run(exact, *wide(inputs)))


@every_flash
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 2048, 32, 32, 2048, 128),  # 7B
        (1, 2048, 64, 8, 2048, 128),  # 70B
        (2, 1000, 16, 4, 1000, 64),
        (2, 130, 8, 8, 130, 80),
        (2, 130, 8, 8, 130, 96),
    ],
    ids=str,
)
def test_flash_equals_the_reference(
    name: str, shape: Any, dtype: str, capability: tuple[int, ...]
) -> None:
    # cuDNN's backward pass uses atomic additions, so it is not deterministic.
    attend = flash_on(name, capability)
    compare(attend, shape, dtype, gradient=name != "cudnn")


def test_the_gradient_of_cudnn_equals_the_reference() -> None:
    inputs = inputs_with_gradient((1, 1024, 16, 4, 1024, 128), "bfloat16")
    actual = run(with_gradient(cudnn.cudnn_attention), *inputs)
    assert_close(actual, run(with_gradient(reference.attention), *wide(inputs)))


def test_triton_flash_in_float32_equals_the_reference() -> None:
    shape = 2, 300, 8, 2, 300, 128
    compare(flash_triton.flash_attention, shape, "float32", gradient=True)


@every_flash
def test_flash_over_a_cache_equals_the_reference(
    name: str, capability: tuple[int, ...]
) -> None:
    start = jnp.asarray([0, 700], jnp.int32)
    shape = 2, 200, 32, 8, 1024, 128
    compare(
        flash_on(name, capability), shape, "bfloat16", gradient=False, q_start=start
    )


@every_flash
def test_flash_of_packed_rows_equals_the_reference(
    name: str, capability: tuple[int, ...]
) -> None:
    lengths = [[1, 299, 500, 224], [1024]]
    ids = jnp.asarray([np.repeat(np.arange(len(x)), x) for x in lengths], jnp.int32)
    shape = 2, 1024, 8, 2, 1024, 128
    gradient = name != "cudnn"
    attend = flash_on(name, capability)
    compare(attend, shape, "bfloat16", gradient=gradient, segment_ids=ids)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("queries", "n", "heads"), [(1, 64, 8), (1, 32, 32), (4, 32, 8)]
)
def test_decoding_equals_the_reference(
    queries: int, n: int, heads: int, int8: bool
) -> None:
    start = jnp.asarray([0, 1, 63, 64, 1000, 4091], jnp.int32)
    q, k, v = arrays(
        (6, queries, n, 128), *[(6, heads, 4096, 128)] * 2, dtype="bfloat16"
    )
    slots = quantized(k, v) if int8 else [k, v]
    attend = functools.partial(decode_triton.decode_attention, q_start=start)
    exact = functools.partial(reference.attention, q_start=start)
    compiled = program(attend, q, *slots)
    out = compiled(q, *slots)
    assert_equal(compiled(q, *slots), out)
    assert_close(out, run(exact, *wide((q, *slots))))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("size", [16, 64, 100])
def test_paged_decoding_equals_the_reference(size: int, int8: bool) -> None:
    start = jnp.asarray([0, 17, 20 * size - 1], jnp.int32)
    k, v, table = pages_of(3, 8, size, 20, 128, "bfloat16")
    (q,) = arrays((3, 1, 64, 128), dtype="bfloat16")
    slots = quantized(k, v) if int8 else [k, v]
    attend = functools.partial(decode_triton.paged_attention, q_start=start)
    exact = functools.partial(reference.paged_attention, q_start=start)
    inputs = q, *slots, table
    assert_close(run(attend, *inputs), run(exact, *wide(inputs)))
