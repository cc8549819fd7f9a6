"""What tests of GPU kernels share: inputs, comparisons, compiling without a GPU."""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, SingleDeviceSharding
from support.tolerances import GPU_KERNEL

from llama_jax.kernels import reference
from llama_jax.kernels.quantized_slots import QuantizedSlots, quantize_slots
from llama_jax.planning.target_devices import gpu_devices

H100 = "NVIDIA H100 80GB HBM3"


def arrays(
    *shapes: tuple[int, ...], dtype: str = "float32", seed: int = 0
) -> list[Any]:
    """Normal numbers."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def wide(tree: Any) -> Any:
    """The same numbers in float32; what is quantized stays."""
    return jax.tree.map(
        lambda x: (
            x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
        ),
        tree,
    )


def assert_near(found: Any, wanted: Any) -> None:
    """To within the tolerance of what was found, relative to the largest entry."""
    found, wanted = map(jax.tree.leaves, (found, wanted))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        tolerance = GPU_KERNEL[str(a.dtype)]
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# Interpreted kernels are compiled for the CPU, once and for tiny arrays.
_QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def program(function: Callable[..., Any], *inputs: Any) -> Callable[..., Any]:
    """One for inputs of these shapes; on a CPU one that is quickly compiled."""
    quickly = _QUICKLY if jax.default_backend() == "cpu" else None
    return jax.jit(function).lower(*inputs).compile(compiler_options=quickly)


def run(function: Callable[..., Any], *inputs: Any) -> Any:
    """Compile it and run it once."""
    return program(function, *inputs)(*inputs)


def with_gradient(attend: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Output and gradients of q, k and v, for a given gradient of the output."""

    def both(q: Any, k: Any, v: Any, given: Any) -> Any:
        out, back = jax.vjp(functools.partial(attend, **settings), q, k, v)
        return out, back(given)

    return both


def assert_like_the_reference(
    attend: Callable[..., Any],
    shape: tuple[int, int, int, int, int, int],
    *,
    dtype: str = "float32",
    **settings: Any,
) -> None:
    """Forward and gradients of random B T N K S H, against the reference in float32."""
    b, t, n, k, s, h = shape
    inputs = arrays(
        *((b, t, n, h), (b, k, s, h), (b, k, s, h), (b, t, n, h)), dtype=dtype
    )
    found = run(with_gradient(attend, **settings), *inputs)
    wanted = run(with_gradient(reference.attention, **settings), *wide(inputs))
    assert found[0].dtype == dtype
    assert_near(found, wanted)


def pages_of(
    rows: int, heads: int, size: int, number: int, width: int, dtype: str
) -> tuple[Any, Any, Any]:
    """Keys and values in more pages than are used, and a table in no order."""
    total = rows * number + 3
    k, v = arrays(*[(total, heads, size, width)] * 2, dtype=dtype)
    order = np.random.default_rng(1).permutation(total)[: rows * number]
    return k, v, jnp.asarray(order.reshape(rows, number), jnp.int32)


def quantized(*slots: Any) -> list[QuantizedSlots]:
    return [quantize_slots(x) for x in slots]


def as_on_an_h100() -> AbstractContextManager[Any]:
    """In which Triton kernels can be lowered where there is no GPU.

    jax 0.7.2 asks for no device, and has no such description of one.
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
    """Shapes of arrays or of `(shape, dtype)`, on a device if one is named."""
    place = None if device is None else SingleDeviceSharding(device)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def h100(assets: pathlib.Path) -> Any:
    """An H100 to compile for, or a skipped test."""
    text = (assets / "gpu" / "h100.target_config.textproto").read_text("utf-8")
    try:
        return gpu_devices("1x1x8", text)[0]
    except ImportError as error:
        pytest.skip(str(error))


def compiled(function: Callable[..., Any], device: Any, *shapes: Any) -> Any:
    """By the GPU's real compiler."""
    with as_on_an_h100():
        for_it = jax.jit(function).lower(*shapes_of(shapes, device))
    return for_it.compile()
