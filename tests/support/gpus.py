"""Support for tests of GPU kernels: comparisons, and compiling without a GPU."""

import contextlib
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, SingleDeviceSharding
from support.attention_inputs import (
    QUICKLY,
    arrays,
    inputs_with_gradient,
    reference_with_gradient,
    with_gradient,
)
from support.attention_inputs import assert_close as assert_close_to
from support.tolerances import GPU_KERNEL

from llama_jax.planning.target_devices import gpu_devices

H100 = "NVIDIA H100 80GB HBM3"


def assert_close(actual: Any, expected: Any) -> None:
    """Compare by the tolerance of each array's dtype, relative to the largest entry."""
    assert_close_to(actual, expected, GPU_KERNEL)


def program(function: Callable[..., Any], *inputs: Any) -> Callable[..., Any]:
    """Compile for inputs of these shapes, on a CPU with few optimizations."""
    options = QUICKLY if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*inputs).compile(compiler_options=options)


def run(function: Callable[..., Any], *inputs: Any) -> Any:
    """Compile and run once."""
    return program(function, *inputs)(*inputs)


def assert_equals_reference(
    attend: Callable[..., Any],
    shape: tuple[int, ...],
    *,
    dtype: str = "float32",
    **settings: Any,
) -> None:
    """Compare output and gradients for B T N K S H with the reference in float32."""
    inputs = inputs_with_gradient(shape, dtype)
    actual = run(with_gradient(attend, **settings), *inputs)
    assert actual[0].dtype == dtype
    assert_close(actual, reference_with_gradient(*inputs, **settings))


def pages_of(
    rows: int, heads: int, size: int, number: int, width: int, dtype: str
) -> tuple[Any, Any, Any]:
    """Pages of keys and values, three of them unused, and a table in random order."""
    total = rows * number + 3
    k, v = arrays(*[(total, heads, size, width)] * 2, dtype=dtype)
    order = np.random.default_rng(1).permutation(total)[: rows * number]
    return k, v, jnp.asarray(order.reshape(rows, number), jnp.int32)


def as_on_an_h100() -> AbstractContextManager[Any]:
    """A context in which Triton kernels can be lowered without a GPU.

    jax 0.7.2 needs no device, and has no such description of one.
    """
    device = getattr(jax.sharding, "AbstractDevice", None)
    try:
        h100 = device(device_kind=H100, num_cores=132, platform="cuda")  # type: ignore
    except TypeError:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100))


def lowered(function: Callable[..., Any], *shapes: Any) -> str:
    """The program for CUDA, as text."""
    with as_on_an_h100():
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def shapes_of(tree: Any, device: Any = None) -> Any:
    """Shapes of arrays or of `(shape, dtype)`, on a device if one is given."""
    sharding = None if device is None else SingleDeviceSharding(device)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def h100(assets: pathlib.Path) -> Any:
    """An H100 to compile for; skips the test if there is no compiler."""
    text = (assets / "gpu" / "h100.target_config.textproto").read_text("utf-8")
    try:
        return gpu_devices("1x1x8", text)[0]
    except ImportError as error:
        pytest.skip(str(error))


def compiled(function: Callable[..., Any], device: Any, *shapes: Any) -> Any:
    """Compile with the GPU's real compiler."""
    with as_on_an_h100():
        program = jax.jit(function).lower(*shapes_of(shapes, device))
    return program.compile()
