"""`linear` against NumPy: every dtype, one row and many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.linear import linear


@pytest.mark.parametrize("inputs", [64, 60, 3])
@pytest.mark.parametrize("rows", [(1, 1), (1,), (), (2, 1), (1, 5)])
def test_products_of_one_row_and_of_many_equal_numpy(
    inputs: int, rows: tuple[int, ...]
) -> None:
    key = jax.random.key(inputs)
    x = jax.random.normal(key, (*rows, inputs))
    w = jax.random.normal(jax.random.fold_in(key, 1), (inputs, 24))
    actual = jax.jit(linear)(x, w)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert actual.shape == expected.shape
    assert actual.dtype == jnp.float32
    # A sum of `inputs` products of size one, each rounded to 24 bits.
    np.testing.assert_allclose(actual, expected, atol=inputs * 2**-22)


def test_a_product_of_one_row_has_gradients() -> None:
    x = jax.random.normal(jax.random.key(0), (1, 64))
    w = jax.random.normal(jax.random.key(1), (64, 24))
    cotangent = jax.random.normal(jax.random.key(2), (1, 24))
    of_x, of_w = jax.grad(lambda x, w: jnp.sum(cotangent * linear(x, w)), (0, 1))(x, w)
    np.testing.assert_allclose(of_x, cotangent @ w.T, atol=1e-5)
    np.testing.assert_allclose(of_w, x.T @ cotangent, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_out_dtype_float32_gives_the_unrounded_sum(dtype: str) -> None:
    x, w = jnp.ones((1, 64), dtype), jnp.full((64, 8), 1 + 2**-7, dtype)
    assert linear(x, w).dtype == dtype
    exact = linear(x, w, out_dtype=jnp.float32)
    assert exact.dtype == jnp.float32
    np.testing.assert_array_equal(exact, 64.5)
