"""Every GPU implementation against the reference, where there is a GPU.

`JAX_PLATFORMS=cuda pytest -n 0 -m gpu tests/kernels/test_on_gpu.py`
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gpus import (
    arrays,
    assert_near,
    pages_of,
    program,
    quantized,
    run,
    wide,
    with_gradient,
)

from llama_jax.kernels import reference
from llama_jax.kernels.gpu import cudnn, decode_triton, flash_triton
from llama_jax.kernels.gpu import flash_mosaic as flash_mosaic_gpu

pytestmark = pytest.mark.gpu

FLASH: dict[str, Callable[..., Any]] = {
    "triton": flash_triton.flash_attention,
    "mosaic_gpu": flash_mosaic_gpu.flash_attention,
    "cudnn": cudnn.cudnn_attention,
}
every_flash = pytest.mark.parametrize("name", FLASH)


@pytest.fixture(autouse=True)
def capability() -> tuple[int, ...]:
    """Of the GPU; skips where there is none that has the kernels."""
    if jax.default_backend() != "gpu":
        pytest.skip("there is no GPU, or JAX_PLATFORMS hides it")
    found = tuple(map(int, jax.devices()[0].compute_capability.split(".")))
    if found < (8, 0):
        pytest.skip(f"compute capability {found}: the kernels begin with Ampere")
    return found


def here(name: str, capability: tuple[int, ...]) -> Callable[..., Any]:
    if name == "mosaic_gpu" and capability[0] != 9:
        pytest.skip("Mosaic GPU's kernel is written for Hopper")
    return FLASH[name]


def compare(
    attend: Callable[..., Any], shape: Any, dtype: str, *, gradient: bool, **given: Any
) -> None:
    """Random B T N K S H, twice, and against the reference in float32."""
    b, t, n, k, s, h = shape
    inputs = arrays(
        *((b, t, n, h), (b, k, s, h), (b, k, s, h), (b, t, n, h)), dtype=dtype
    )
    exact: Callable[..., Any] = reference.attention
    if gradient:
        found = with_gradient(attend, **given)
        exact = with_gradient(exact, **given)
    else:
        inputs, found = inputs[:3], functools.partial(attend, **given)
        exact = functools.partial(exact, **given)
    made = program(found, *inputs)
    first, again = (made(*inputs) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert_near(first, run(exact, *wide(inputs)))


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
    # cuDNN's backward pass adds with atomics, in any order: it need not repeat itself.
    attend = here(name, capability)
    compare(attend, shape, dtype, gradient=name != "cudnn")


def test_cudnns_gradient_equals_the_references() -> None:
    inputs = arrays(
        *((1, 1024, 16, 128), *[(1, 4, 1024, 128)] * 2, (1, 1024, 16, 128)),
        dtype="bfloat16",
    )
    found = run(with_gradient(cudnn.cudnn_attention), *inputs)
    assert_near(found, run(with_gradient(reference.attention), *wide(inputs)))


def test_tritons_flash_in_float32_equals_the_reference() -> None:
    shape = 2, 300, 8, 2, 300, 128
    compare(flash_triton.flash_attention, shape, "float32", gradient=True)


@every_flash
def test_flash_over_a_cache_equals_the_reference(
    name: str, capability: tuple[int, ...]
) -> None:
    start = jnp.asarray([0, 700], jnp.int32)
    shape = 2, 200, 32, 8, 1024, 128
    compare(here(name, capability), shape, "bfloat16", gradient=False, q_start=start)


@every_flash
def test_flash_of_packed_rows_equals_the_reference(
    name: str, capability: tuple[int, ...]
) -> None:
    lengths = [[1, 299, 500, 224], [1024]]
    ids = jnp.asarray([np.repeat(np.arange(len(x)), x) for x in lengths], jnp.int32)
    shape = 2, 1024, 8, 2, 1024, 128
    gradient = name != "cudnn"
    attend = here(name, capability)
    compare(attend, shape, "bfloat16", gradient=gradient, segment_ids=ids)


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize(
    ("queries", "n", "heads"), [(1, 64, 8), (1, 32, 32), (4, 32, 8)]
)
def test_decoding_equals_the_reference(
    queries: int, n: int, heads: int, eight_bits: bool
) -> None:
    start = jnp.asarray([0, 1, 63, 64, 1000, 4091], jnp.int32)
    q, k, v = arrays(
        (6, queries, n, 128), *[(6, heads, 4096, 128)] * 2, dtype="bfloat16"
    )
    slots = quantized(k, v) if eight_bits else [k, v]
    attend = functools.partial(decode_triton.decode_attention, q_start=start)
    exact = functools.partial(reference.attention, q_start=start)
    made = program(attend, q, *slots)
    found, again = (made(q, *slots) for _ in range(2))
    np.testing.assert_array_equal(found, again)
    assert_near(found, run(exact, *wide((q, *slots))))


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("size", [16, 64, 100])
def test_paged_decoding_equals_the_reference(size: int, eight_bits: bool) -> None:
    start = jnp.asarray([0, 17, 20 * size - 1], jnp.int32)
    k, v, table = pages_of(3, 8, size, 20, 128, "bfloat16")
    (q,) = arrays((3, 1, 64, 128), dtype="bfloat16")
    slots = quantized(k, v) if eight_bits else [k, v]
    attend = functools.partial(decode_triton.paged_attention, q_start=start)
    exact = functools.partial(reference.paged_attention, q_start=start)
    inputs = q, *slots, table
    assert_near(run(attend, *inputs), run(exact, *wide(inputs)))
