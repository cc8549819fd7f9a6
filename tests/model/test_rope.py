"""Rotary positions: what they mean, Meta's layout, and how exact they are far out."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import oracle
from support.models import TINY
from support.tolerances import ROPE_LONG, ROPE_ROTATION, ROPE_TABLES

from llama_jax.config import RopeScaling
from llama_jax.model.rope import apply_rope, rope_frequencies, rope_tables

T, N, H = 5, 3, 8


LLAMA31 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_seq_len=8192,
)
YARN = RopeScaling(
    kind="yarn",
    factor=8.0,
    original_max_seq_len=100,
    attention_factor=1.2,
    beta_fast=32.0,
    beta_slow=0.1,
    truncate=True,
)
SCALINGS = {
    "linear": RopeScaling(kind="linear", factor=4.0),
    "llama3.1": LLAMA31,
    "llama3.2": dataclasses.replace(LLAMA31, factor=32.0),
    # Of the four frequencies of H = 8 this keeps one and interpolates one.
    "short": dataclasses.replace(LLAMA31, original_max_seq_len=100),
    "dynamic": RopeScaling(kind="dynamic", factor=2.0, original_max_seq_len=40),
    "yarn": YARN,
    "yarn, not truncated": dataclasses.replace(YARN, truncate=False, beta_fast=4.0),
}
WIDE = TINY.replace(head_dim=128, rope_theta=5e5)


def turn(
    x: np.ndarray,
    positions: np.ndarray,
    theta: float = 1e4,
    scaling: RopeScaling | None = None,
) -> np.ndarray:
    """`x` `[T, N, H]` rotated by the library."""
    config = TINY.replace(rope_theta=theta, rope_scaling=scaling)
    tables = rope_tables(jnp.asarray(positions)[None], config)
    return np.asarray(apply_rope(jnp.asarray(x, jnp.float32)[None], tables)[0])


def heads(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(T, N, H)).astype(np.float32)


def test_position_zero_rotates_nothing() -> None:
    np.testing.assert_array_equal(turn(heads(0), np.zeros(T, int)), heads(0))


@given(
    st.lists(st.integers(0, 100), min_size=T, max_size=T),
    st.lists(st.integers(0, 100), min_size=T, max_size=T),
    st.integers(0, 100),
)
def test_scores_depend_on_the_distance_only(
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
def test_rotation_equals_the_oracle(theta: float) -> None:
    positions = np.array([0, 1, 17, 99, 3])
    expected = oracle.rotate(heads(3), positions, theta)
    np.testing.assert_allclose(
        turn(heads(3), positions, theta), expected, rtol=0, atol=ROPE_ROTATION
    )


def test_half_split_rotation_equals_metas_interleaved_one_permuted() -> None:
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

    actual = turn(permuted(interleaved), positions)
    np.testing.assert_allclose(actual, permuted(turned), rtol=0, atol=ROPE_ROTATION)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_positions_of_a_hundred_thousand_stay_exact(theta: float) -> None:
    positions = np.array([99_999, 100_000, 65_537, 16_384, 1])
    expected = oracle.rotate(heads(5), positions, theta)
    norms = np.linalg.norm(heads(5), axis=-1, keepdims=True)
    error = np.abs(turn(heads(5), positions, theta) - expected) / norms
    assert error.max() < ROPE_LONG


def test_tables_are_exact_for_the_float32_angle() -> None:
    # Reduction of large angles to one turn must not lose what float32 still holds.
    positions = np.array([[0, 1, 1000, 65_537, 99_999]])
    config = TINY.replace(head_dim=128)
    tables = rope_tables(jnp.asarray(positions), config)
    exponent = np.arange(0, 128, 2, dtype=np.float32) / np.float32(128)
    frequency = np.float32(1) / np.float32(1e4) ** exponent
    angle = (positions[..., None].astype(np.float32) * frequency).astype(np.float64)
    assert tables.cos.dtype == tables.sin.dtype == jnp.float32
    np.testing.assert_allclose(tables.cos, np.cos(angle), rtol=0, atol=ROPE_TABLES)
    np.testing.assert_allclose(tables.sin, np.sin(angle), rtol=0, atol=ROPE_TABLES)


def test_rotation_keeps_the_dtype_and_computes_in_float32() -> None:
    positions = jnp.asarray([[0, 1, 17, 99, 3]])
    tables = rope_tables(positions, TINY)
    rounded = jnp.asarray(heads(6), jnp.bfloat16)[None]
    actual = apply_rope(rounded, tables)
    assert actual.dtype == jnp.bfloat16
    exact = apply_rope(rounded.astype(jnp.float32), tables)
    np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_scaled_rotation_equals_the_oracle(name: str, theta: float) -> None:
    positions = np.array([0, 1, 17, 99, 3])
    expected = oracle.rotate(
        heads(7), positions, theta, SCALINGS[name], TINY.max_seq_len
    )
    actual = turn(heads(7), positions, theta, SCALINGS[name])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ROPE_ROTATION)
    assert np.abs(actual - turn(heads(7), positions, theta)).max() > 0.1


@pytest.mark.parametrize("name", ["linear", "llama3.1", "llama3.2"])
def test_frequencies_are_scaled_in_float32_as_published(name: str) -> None:
    scaling, one = SCALINGS[name], np.float32
    expected = []
    for frequency in rope_frequencies(WIDE):
        if scaling.kind == "linear":
            expected.append(frequency / one(scaling.factor))
            continue
        old, low, high = (
            one(scaling.original_max_seq_len),
            one(scaling.low_freq_factor),
            one(scaling.high_freq_factor),
        )
        wavelength = one(2 * np.pi) / frequency
        if wavelength < old / high:
            expected.append(frequency)
        elif wavelength > old / low:
            expected.append(frequency / one(scaling.factor))
        else:
            smooth = (old / wavelength - low) / (high - low)
            stretched = (one(1) - smooth) * frequency / one(scaling.factor)
            expected.append(stretched + smooth * frequency)
    actual = rope_frequencies(WIDE.replace(rope_scaling=scaling))
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("name", ["llama3.1", "yarn"])
def test_short_wavelengths_stay_and_long_ones_are_stretched(name: str) -> None:
    frequency = rope_frequencies(WIDE)
    ratio = frequency / rope_frequencies(WIDE.replace(rope_scaling=SCALINGS[name]))
    assert (ratio[0], ratio[-1]) == (1, 8)
    assert (np.diff(ratio) >= -1e-6).all()
    assert ((ratio > 1.01) & (ratio < 7.99)).sum() > 5


def test_the_dynamic_base_is_that_of_the_longest_sequence() -> None:
    def frequencies(max_seq_len: int, num_tokens: int = 0) -> Any:
        changes: dict[str, Any] = {"max_seq_len": max_seq_len}
        return rope_frequencies(
            WIDE.replace(rope_scaling=dynamic, **changes), num_tokens
        )

    dynamic = SCALINGS["dynamic"]
    unscaled = rope_frequencies(WIDE)
    np.testing.assert_array_equal(frequencies(20), unscaled)
    np.testing.assert_array_equal(frequencies(40), unscaled)
    # The NTK-aware base: the longest wavelength grows with the context, as if linear.
    np.testing.assert_allclose(unscaled[-1] / frequencies(80)[-1], 3, rtol=1e-4)
    np.testing.assert_array_equal(frequencies(20, 80), frequencies(80, 20))
