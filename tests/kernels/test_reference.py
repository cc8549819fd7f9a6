"""The reference of attention against float64 NumPy, and its gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from support import oracle
from support.attention_inputs import T, inputs
from support.tolerances import ATTENTION_FLOAT32, FINITE_DIFFERENCES

from llama_jax.kernels import attention

HEADS = pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 2), (4, 1)])
SEGMENTS = np.array([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5], [1, 2, 2, 2, 3, 3]])

attend = jax.jit(attention, static_argnames="implementation")


def expected(
    q: Any, k: Any, v: Any, starts: Any = None, segments: Any = None
) -> np.ndarray:
    """The output of the oracle, row by row."""
    rows = [
        oracle.attend(
            q[row],
            k[row].swapaxes(0, 1),
            v[row].swapaxes(0, 1),
            q_start=0 if starts is None else int(starts[row]),
            segments=None if segments is None else segments[row],
        )
        for row in range(len(q))
    ]
    return np.stack(rows)


@HEADS
def test_attention_equals_float64(n: int, k: int) -> None:
    q, keys, values = inputs(n, k)
    np.testing.assert_allclose(
        attend(q, keys, values),
        expected(q, keys, values),
        rtol=ATTENTION_FLOAT32,
        atol=ATTENTION_FLOAT32,
    )


@HEADS
def test_attention_over_a_cache_equals_float64(n: int, k: int) -> None:
    q, keys, values = inputs(n, k, slots=16)
    starts = jnp.asarray([0, 10, 3])
    np.testing.assert_allclose(
        attend(q, keys, values, q_start=starts),
        expected(q, keys, values, starts),
        rtol=ATTENTION_FLOAT32,
        atol=ATTENTION_FLOAT32,
    )


@HEADS
def test_attention_of_packed_rows_equals_float64(n: int, k: int) -> None:
    q, keys, values = inputs(n, k)
    np.testing.assert_allclose(
        attend(q, keys, values, segment_ids=jnp.asarray(SEGMENTS)),
        expected(q, keys, values, segments=SEGMENTS),
        rtol=ATTENTION_FLOAT32,
        atol=ATTENTION_FLOAT32,
    )


def test_slots_after_the_query_are_ignored() -> None:
    q, keys, values = inputs(4, 2, slots=16)
    starts = jnp.asarray([0, 10, 3])
    clean = attend(q, keys, values, q_start=starts)
    after = np.arange(16)[None] >= np.asarray(starts)[:, None] + T
    dirt = jnp.where(after[:, None, :, None], 1e9, 0.0)
    dirty = attend(q, keys + dirt, values + dirt, q_start=starts)
    np.testing.assert_array_equal(clean, dirty)


def test_large_scores_do_not_overflow() -> None:
    q, keys, values = inputs(4, 2)
    np.testing.assert_allclose(
        attend(q * 1e4, keys * 1e4, values),
        expected(q * 1e4, keys * 1e4, values),
        rtol=ATTENTION_FLOAT32,
        atol=ATTENTION_FLOAT32,
    )


@HEADS
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_finite_differences(n: int, k: int, packed: bool) -> None:
    segments = jnp.asarray(SEGMENTS) if packed else None
    check_grads(
        functools.partial(attend, segment_ids=segments),
        inputs(n, k),
        order=1,
        modes=["rev"],
        atol=FINITE_DIFFERENCES,
        rtol=FINITE_DIFFERENCES,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_has_the_queries_dtype(dtype: str) -> None:
    q, keys, values = (x.astype(dtype) for x in inputs(4, 2))
    assert attend(q, keys, values).dtype == dtype
    assert attend(q, keys.astype(jnp.float32), values.astype(jnp.float32)).dtype == (
        dtype
    )


def test_auto_equals_a_named_implementation() -> None:
    q, keys, values = inputs(4, 2)
    named = attend(q, keys, values, implementation="xla")
    np.testing.assert_array_equal(named, attend(q, keys, values))
