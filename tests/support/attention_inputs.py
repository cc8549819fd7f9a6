"""Random inputs, gradients and comparisons for tests of attention."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.kernels import reference
from llama_jax.kernels.quantized_slots import QuantizedSlots, quantize_slots

B, T, H = 3, 6, 8

newest_only = (
    pytest.mark.slow
    if jax.__version_info__ < (0, 8)
    else pytest.mark.skipif(False, reason="in the fast tier of the newest jax")
)
"""Marks tests of interpreted kernels that are `slow` at the oldest supported jax.

There, a few representative tests of each kernel remain in the fast tier.
"""

no_bfloat16_product = pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="the CPU backend of jax 0.7.2 lacks a bfloat16 product on some processors",
)

# Compilation dominates the time of an interpreted kernel.
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def quick_jit(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`jax.jit` with the fewest optimizations on a CPU, unchanged elsewhere."""
    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(function, compiler_options=QUICKLY if on_cpu else None, **settings)


def arrays(
    *shapes: tuple[int, ...], dtype: str = "float32", seed: int = 0
) -> list[jax.Array]:
    """Arrays of normally distributed numbers."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def inputs(n: int, k: int, slots: int = T, seed: int = 0) -> list[jax.Array]:
    """Random q, k and v."""
    return arrays((B, T, n, H), (B, k, slots, H), (B, k, slots, H), seed=seed)


def inputs_with_gradient(
    shape: tuple[int, ...], dtype: str = "float32", seed: int = 0
) -> list[jax.Array]:
    """Random q, k, v and gradient of the output, of B T N K S H."""
    b, t, n, k, s, h = shape
    q, slots = (b, t, n, h), (b, k, s, h)
    return arrays(q, slots, slots, q, dtype=dtype, seed=seed)


def wide(tree: Any) -> Any:
    """The same numbers in float32; int8 stays."""
    return jax.tree.map(
        lambda x: (
            x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x
        ),
        tree,
    )


def quantized(*slots: Any) -> list[QuantizedSlots]:
    """The same slots in int8."""
    return [quantize_slots(x) for x in slots]


def with_gradient(attend: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """Output and gradients of q, k and v, from the gradient of the output."""

    def both(q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
        out, backward = jax.vjp(functools.partial(attend, **settings), q, k, v)
        return out, *backward(d_out)

    return both


@functools.cache
def _reference(names: tuple[str, ...]) -> Callable[..., Any]:
    def both(inputs: Any, values: Any) -> Any:
        settings = dict(zip(names, values, strict=True))
        return with_gradient(reference.attention, **settings)(*inputs)

    return quick_jit(both)


def reference_with_gradient(*inputs: Any, **settings: Any) -> tuple[Any, ...]:
    """Output and gradients of the reference in float32."""
    return _reference(tuple(settings))(wide(inputs), tuple(settings.values()))


def assert_close(
    actual: Any, expected: Any, tolerances: Mapping[str, float], dtype: Any = None
) -> None:
    """Compare every array, relative to the largest entry, by the tolerance of a dtype.

    Args:
      actual: tree of arrays.
      expected: tree of the same shapes.
      tolerances: by dtype.
      dtype: expected dtype of the actual arrays; not checked if omitted.
    """
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert dtype is None or one.dtype == dtype
        assert one.shape == other.shape
        tolerance = tolerances[str(one.dtype)]
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        atol = tolerance * np.abs(other).max()
        np.testing.assert_allclose(
            one, other, rtol=0, atol=atol, err_msg=f"array {number}"
        )


def assert_close_with_gradient(
    actual: tuple[Any, ...],
    expected: tuple[Any, ...],
    dtype: Any = "float32",
    *,
    forward: Mapping[str, float],
    backward: Mapping[str, float],
) -> None:
    """Compare output and gradients, each by its tolerances."""
    assert_close(actual[0], expected[0], forward, dtype)
    assert_close(actual[1:], expected[1:], backward, dtype)


def assert_equal(actual: Any, expected: Any) -> None:
    """Every array is equal, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
