"""Losses of reward models and policies against loops in NumPy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.rlhf.losses import (
    dpo_losses,
    ipo_losses,
    kl_estimates,
    policy_losses,
    ranking_losses,
    safety_losses,
    value_losses,
)

B, T = 3, 6
SEEDS = st.integers(0, 2**32 - 1)
FEW = settings(max_examples=25, deadline=None)


def normal(seed: int, count: int, *shape: int) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return list(draw.standard_normal((count, *shape)).astype(np.float32))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


@FEW
@given(seed=SEEDS)
def test_ranking_losses_equal_a_loop(seed: int) -> None:
    chosen, rejected, margin = normal(seed, 3, B)
    expected = [
        -log_sigmoid(c - r - m)
        for c, r, m in zip(chosen, rejected, margin, strict=True)
    ]
    actual = ranking_losses(*map(jnp.asarray, (chosen, rejected, margin)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    # A margin belongs to its pair: another order of margins is another loss.
    other = ranking_losses(*map(jnp.asarray, (chosen, rejected, margin[::-1])))
    assert not np.allclose(actual, other)
    assert actual.shape == (B,)
    labels = margin > 0
    expected = [
        -log_sigmoid(c if safe else -c) for c, safe in zip(chosen, labels, strict=True)
    ]
    np.testing.assert_allclose(
        safety_losses(jnp.asarray(chosen), jnp.asarray(labels)), expected, rtol=1e-5
    )


@FEW
@given(seed=SEEDS)
def test_clipped_losses_equal_a_loop(seed: int) -> None:
    new, old, advantages, values, old_values, returns = normal(seed, 6, B, T)
    mask = np.random.default_rng(seed).random((B, T)) < 0.6
    actual = policy_losses(*map(jnp.asarray, (new, old, advantages, mask)))
    critic = value_losses(*map(jnp.asarray, (values, old_values, returns, mask)))
    for b in range(B):
        for t in range(T):
            if not mask[b, t]:
                assert actual.losses[b, t] == critic.losses[b, t] == 0
                assert not actual.is_clipped[b, t]
                assert not critic.is_clipped[b, t]
                continue
            ratio = math.exp(new[b, t] - old[b, t])
            near = min(max(ratio, 0.8), 1.2)
            expected = -min(ratio * advantages[b, t], near * advantages[b, t])
            np.testing.assert_allclose(actual.losses[b, t], expected, rtol=1e-4)
            close = old_values[b, t] + min(
                max(values[b, t] - old_values[b, t], -0.2), 0.2
            )
            errors = [(v - returns[b, t]) ** 2 for v in (values[b, t], close)]
            np.testing.assert_allclose(
                critic.losses[b, t], max(errors) / 2, rtol=1e-4, atol=1e-6
            )


def test_what_was_not_sampled_changes_no_bit_of_loss_and_gradient() -> None:
    arrays = normal(0, 6, B, T)
    mask = np.arange(T)[None] < np.array([[2], [4], [6]])

    def total(new: Any, values: Any, old: Any, *rest: Any) -> Any:
        advantages, old_values, returns = rest
        policy = policy_losses(new, old, advantages, jnp.asarray(mask))
        critic = value_losses(values, old_values, returns, jnp.asarray(mask))
        estimates = kl_estimates(new, old, jnp.asarray(mask))
        return sum(jnp.sum(x) for x in (policy.losses, critic.losses, estimates))

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    clean = gradient(*map(jnp.asarray, arrays))
    dirty = gradient(*(jnp.where(jnp.asarray(mask), a, jnp.nan) for a in arrays))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_the_first_update_is_the_policy_gradient() -> None:
    new, advantages = map(jnp.asarray, normal(0, 2, B, T))
    mask = jnp.ones((B, T), bool)

    def total(logprobs: Any) -> Any:
        return jnp.sum(policy_losses(logprobs, new, advantages, mask).losses)

    np.testing.assert_array_equal(jax.grad(total)(new), -advantages)


@FEW
@given(seed=SEEDS)
def test_kl_estimates_are_unbiased_and_not_negative(seed: int) -> None:
    policy, reference = (
        jax.nn.log_softmax(jnp.asarray(logits)) for logits in normal(seed, 2, 1, 8)
    )
    estimates = kl_estimates(policy, reference, jnp.ones((1, 8), bool))
    assert (np.asarray(estimates) >= -1e-6).all()
    exact = jnp.sum(jnp.exp(policy) * (policy - reference))
    np.testing.assert_allclose(
        jnp.sum(jnp.exp(policy) * estimates), exact, rtol=1e-4, atol=1e-6
    )
    equal = kl_estimates(policy, policy, jnp.ones((1, 8), bool))
    assert not np.asarray(equal).any()


@FEW
@given(seed=SEEDS, beta=st.floats(0.01, 1.0))
def test_preference_losses_equal_a_loop(seed: int, beta: float) -> None:
    logs = normal(seed, 5, B)
    difference = (logs[0] - logs[2]) - (logs[1] - logs[3])
    actual = dpo_losses(*map(jnp.asarray, logs), beta=beta)
    expected = [
        -log_sigmoid(beta * d - m) for d, m in zip(difference, logs[4], strict=True)
    ]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    actual = ipo_losses(*map(jnp.asarray, logs[:4]), beta=beta)
    np.testing.assert_allclose(
        actual, (difference - 1 / (2 * beta)) ** 2, rtol=1e-3, atol=1e-5
    )


def test_equal_policies_have_the_loss_ln_2_and_a_gradient() -> None:
    chosen, rejected = map(jnp.asarray, normal(0, 2, B))

    def total(chosen: Any, rejected: Any, *reference: Any) -> Any:
        return jnp.sum(dpo_losses(chosen, rejected, *reference))

    losses = dpo_losses(chosen, rejected, chosen, rejected)
    np.testing.assert_array_equal(losses, np.full(B, np.log(2), np.float32))
    gradient = jax.grad(total)(chosen, rejected, chosen, rejected)
    np.testing.assert_allclose(gradient, np.full(B, -0.05), rtol=1e-6)
