"""Rotary positions: what they mean, Meta's layout, and how exact they are far out."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerances import ROPE_LONG, ROPE_ROTATION, ROPE_TABLES

from llama_jax.rope import apply_rope, rope_tables

T, N, H = 5, 3, 8


def turn(x: np.ndarray, positions: np.ndarray, theta: float = 1e4) -> np.ndarray:
    """`x` `[T, N, H]` rotated by the library."""
    tables = rope_tables(jnp.asarray(positions)[None], x.shape[-1], theta)
    return np.asarray(apply_rope(jnp.asarray(x, jnp.float32)[None], tables)[0])


def heads(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(T, N, H)).astype(np.float32)


def test_position_zero_turns_nothing() -> None:
    np.testing.assert_array_equal(turn(heads(0), np.zeros(T, int)), heads(0))


@given(
    st.lists(st.integers(0, 100), min_size=T, max_size=T),
    st.lists(st.integers(0, 100), min_size=T, max_size=T),
    st.integers(0, 100),
)
def test_scores_depend_on_the_distance_alone(
    queries: list[int], keys: list[int], shift: int
) -> None:
    q, k = heads(1), heads(2)
    here = turn(q, np.array(queries)) * turn(k, np.array(keys))
    there = turn(q, np.array(queries) + shift) * turn(k, np.array(keys) + shift)
    np.testing.assert_allclose(
        here.sum(-1), there.sum(-1), rtol=0, atol=H * ROPE_ROTATION
    )


def test_scores_do_depend_on_the_distance() -> None:
    q, k = heads(1), heads(2)
    fixed = (turn(q, np.full(T, 7)) * turn(k, np.full(T, 7))).sum(-1)
    moved = (turn(q, np.full(T, 8)) * turn(k, np.full(T, 7))).sum(-1)
    assert np.abs(fixed - moved).max() > 0.1


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotation_equals_the_oracles(theta: float) -> None:
    positions = np.array([0, 1, 17, 99, 3])
    wanted = oracle.rotate(heads(3), positions, theta)
    np.testing.assert_allclose(
        turn(heads(3), positions, theta), wanted, rtol=0, atol=ROPE_ROTATION
    )


def test_half_split_rotation_is_metas_interleaved_one_permuted() -> None:
    # Meta: entries 2i and 2i + 1 of a head are a complex number, multiplied by
    # exp(i · position · theta^(-2i/H)).
    interleaved = heads(4)
    positions = np.array([0, 1, 2, 50, 100])
    pairs = interleaved[..., 0::2] + 1j * interleaved[..., 1::2].astype(np.float64)
    angle = positions[:, None] * 1e4 ** (-np.arange(0, H, 2) / H)
    pairs = pairs * np.exp(1j * angle)[:, None]
    turned = np.stack([pairs.real, pairs.imag], axis=-1).reshape(T, N, H)

    def permuted(x: np.ndarray) -> np.ndarray:
        """(N h two) -> (N two h)"""
        return x.reshape(T, N, H // 2, 2).swapaxes(-1, -2).reshape(T, N, H)

    found = turn(permuted(interleaved), positions)
    np.testing.assert_allclose(found, permuted(turned), rtol=0, atol=ROPE_ROTATION)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_positions_of_a_hundred_thousand_stay_exact(theta: float) -> None:
    positions = np.array([99_999, 100_000, 65_537, 16_384, 1])
    wanted = oracle.rotate(heads(5), positions, theta)
    norms = np.linalg.norm(heads(5), axis=-1, keepdims=True)
    error = np.abs(turn(heads(5), positions, theta) - wanted) / norms
    assert error.max() < ROPE_LONG


def test_tables_are_exact_for_the_float32_angle() -> None:
    # Reduction of large angles to one turn must not lose what float32 still holds.
    positions = np.array([[0, 1, 1000, 65_537, 99_999]])
    tables = rope_tables(jnp.asarray(positions), 128, 1e4)
    exponent = np.arange(0, 128, 2, dtype=np.float32) / np.float32(128)
    frequency = np.float32(1) / np.float32(1e4) ** exponent
    angle = (positions[..., None].astype(np.float32) * frequency).astype(np.float64)
    assert tables.cos.dtype == tables.sin.dtype == jnp.float32
    np.testing.assert_allclose(tables.cos, np.cos(angle), rtol=0, atol=ROPE_TABLES)
    np.testing.assert_allclose(tables.sin, np.sin(angle), rtol=0, atol=ROPE_TABLES)


def test_rotation_keeps_the_dtype_and_computes_in_float32() -> None:
    positions = jnp.asarray([[0, 1, 17, 99, 3]])
    tables = rope_tables(positions, H, 1e4)
    rounded = jnp.asarray(heads(6), jnp.bfloat16)[None]
    found = apply_rope(rounded, tables)
    assert found.dtype == jnp.bfloat16
    exact = apply_rope(rounded.astype(jnp.float32), tables)
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
