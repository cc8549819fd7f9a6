"""Rewards, advantages and returns against loops in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.rlhf.estimators import (
    combine_rewards,
    gae,
    grpo,
    rloo,
    token_rewards,
    whiten,
)

B, T = 3, 7
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25, deadline=None)


def draw_mask(draw: np.random.Generator) -> np.ndarray:
    """Rows of sampled tokens: one stretch each, of at least one token."""
    first = draw.integers(0, T - 1, B)
    last = draw.integers(first + 1, T + 1)
    slots = np.arange(T)
    return (slots >= first[:, None]) & (slots < last[:, None])


def normal(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return draw.standard_normal(shape).astype(np.float32)


def loop_gae(
    rewards: np.ndarray, values: np.ndarray, discount: float, decay: float
) -> np.ndarray:
    """Advantages of one answer, as the sum over all later errors."""
    padded = [*values, 0.0]
    errors = [
        rewards[t] + discount * padded[t + 1] - padded[t] for t in range(len(rewards))
    ]
    return np.array(
        [
            sum(
                (discount * decay) ** (s - t) * errors[s] for s in range(t, len(errors))
            )
            for t in range(len(errors))
        ]
    )


@FEW
@given(seed=SEEDS, discount=st.sampled_from([1.0, 0.9]), decay=st.floats(0, 1))
def test_gae_equals_a_double_loop(seed: int, discount: float, decay: float) -> None:
    draw = np.random.default_rng(seed)
    mask, rewards, values = draw_mask(draw), normal(draw, B, T), normal(draw, B, T)
    unused = np.where(mask, 0.0, np.nan).astype(np.float32)
    actual = gae(
        jnp.asarray(rewards + unused),
        jnp.asarray(values + unused),
        jnp.asarray(mask),
        discount=discount,
        decay=decay,
    )
    for row in range(B):
        sampled = mask[row]
        expected = loop_gae(
            rewards[row, sampled], values[row, sampled], discount, decay
        )
        advantages = np.asarray(actual.advantages)[row]
        np.testing.assert_allclose(advantages[sampled], expected, atol=2e-5)
        returns = np.asarray(actual.returns)[row, sampled]
        np.testing.assert_allclose(returns, expected + values[row, sampled], atol=2e-5)
        assert not advantages[~sampled].any()


@FEW
@given(seed=SEEDS)
def test_the_score_is_at_the_last_sampled_token_alone(seed: int) -> None:
    draw = np.random.default_rng(seed)
    mask, scores = draw_mask(draw), normal(draw, B)
    policy, reference = normal(draw, B, T), normal(draw, B, T)
    unused = np.where(mask, 0.0, np.nan).astype(np.float32)
    arrays = map(jnp.asarray, (scores, policy + unused, reference, mask))
    rewards = np.asarray(token_rewards(*arrays, kl_coefficient=0.0))
    for row in range(B):
        last = int(np.flatnonzero(mask[row])[-1])
        assert rewards[row, last] == scores[row]
        assert not np.delete(rewards[row], last).any()
    arrays = map(jnp.asarray, (scores, policy + unused, reference, mask))
    rewards = np.asarray(token_rewards(*arrays, kl_coefficient=0.5))
    expected = [
        scores[row]
        - 0.5 * sum((policy - reference)[row, t] for t in range(T) if mask[row, t])
        for row in range(B)
    ]
    np.testing.assert_allclose(rewards.sum(axis=1), expected, rtol=1e-5, atol=1e-5)


def test_the_return_at_the_first_token_is_the_score_whatever_the_dtype() -> None:
    mask = jnp.array([[False, True, True, False]])
    zeros = jnp.zeros((1, 4))
    for dtype in (jnp.float32, jnp.bfloat16):
        score = jnp.array([0.3], dtype)
        rewards = token_rewards(score, zeros, zeros, mask, kl_coefficient=0.1)
        assert rewards.dtype == jnp.float32
        result = gae(rewards, zeros, mask, decay=1.0)
        assert float(result.returns[0, 1]) == float(score[0])


def test_the_penalty_has_the_gradient_of_the_exact_divergence() -> None:
    """All 8³ sequences of 3 tokens are enumerated."""
    draw = np.random.default_rng(0)
    start = jnp.asarray(normal(draw, 3, 8))
    reference = jax.nn.log_softmax(jnp.asarray(normal(draw, 3, 8)))
    ids = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1).reshape(-1, 3)
    mask = jnp.ones(ids.shape, bool)

    def logprobs_of(table: jax.Array) -> jax.Array:
        return table[np.arange(3)[None], ids]

    def exact(theta: jax.Array) -> jax.Array:
        policy = jax.nn.log_softmax(theta)
        return jnp.sum(jnp.exp(policy) * (policy - reference))

    def policy_gradient_surrogate(theta: jax.Array) -> jax.Array:
        logprobs = logprobs_of(jax.nn.log_softmax(theta))
        frozen = jax.lax.stop_gradient(logprobs)
        penalty = -token_rewards(
            jnp.zeros(len(ids)),
            frozen,
            logprobs_of(reference),
            mask,
            kl_coefficient=1.0,
        )
        probability = jnp.exp(frozen.sum(axis=1))
        returns = penalty.sum(axis=1)
        return jnp.sum(probability * returns * logprobs.sum(axis=1)), jnp.sum(
            probability * returns
        )

    gradient, value = jax.grad(policy_gradient_surrogate, has_aux=True)(start)
    np.testing.assert_allclose(value, exact(start), rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(exact)(start), atol=1e-5)


@FEW
@given(seed=SEEDS)
def test_combined_rewards_are_gated_and_whitened(seed: int) -> None:
    draw = np.random.default_rng(seed)
    helpful, safe = 3 * normal(draw, 16), 3 * normal(draw, 16)
    tagged = draw.random(16) < 0.3
    combined = combine_rewards(*map(jnp.asarray, (helpful, safe, tagged)))
    expected = [
        s if tag or 1 / (1 + math.exp(-s)) < 0.15 else h
        for h, s, tag in zip(helpful, safe, tagged, strict=True)
    ]
    np.testing.assert_array_equal(combined, np.array(expected, np.float32))
    white = np.asarray(whiten(combined))
    np.testing.assert_allclose([white.mean(), white.std()], [0, 1], atol=1e-5)
    kept = np.asarray(whiten(combined, keep_mean=True))
    np.testing.assert_allclose(kept, white + np.mean(expected), atol=1e-5)
    half = jnp.arange(16) < 8
    part = np.asarray(whiten(jnp.where(half, combined, jnp.nan), half))
    np.testing.assert_allclose([part[:8].mean(), part[:8].std()], [0, 1], atol=1e-5)
    assert not part[8:].any()


@FEW
@given(seed=SEEDS, count=st.integers(2, 5))
def test_answers_are_compared_with_those_to_the_same_prompt(
    seed: int, count: int
) -> None:
    rewards = normal(np.random.default_rng(seed), 4, count)
    left_out, centered = rloo(jnp.asarray(rewards)), grpo(jnp.asarray(rewards))
    for prompt in range(4):
        row = rewards[prompt].astype(np.float64)
        for k in range(count):
            others = np.mean([row[j] for j in range(count) if j != k])
            np.testing.assert_allclose(left_out[prompt, k], row[k] - others, atol=1e-5)
        scaled = (row - row.mean()) / row.std()
        np.testing.assert_allclose(centered[prompt], scaled, rtol=1e-3, atol=1e-4)
    unscaled = grpo(jnp.asarray(rewards), scale=False)
    means = rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(unscaled, rewards - means, atol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_no_advantage(scale: bool) -> None:
    assert not np.asarray(grpo(jnp.full((2, 4), 0.7), scale=scale)).round(6).any()
