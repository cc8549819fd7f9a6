"""Losses of reward models and policies: pure functions of their outputs.

Arrays of tokens are aligned and masked as in `llama_jax.rlhf.estimators`. Losses are
not averaged: their sum over parts of a batch is the sum over the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.types import Array, Bool, Float


class Clipped(NamedTuple):
    """Losses of tokens, 0 where nothing was sampled.

    Attributes:
      losses: of each token.
      is_clipped: whether the clipped value gave the loss, so that it has no gradient.
    """

    losses: Float[Array, "B T"]
    is_clipped: Bool[Array, "B T"]


def ranking_losses(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    margin: Float[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """Compute the loss of a reward model (arXiv:2307.09288, equation 2).

        L = -log σ(r_chosen - r_rejected - m)

    Args:
      chosen: scores of the preferred answers.
      rejected: scores of the others.
      margin: m, larger for more distinct preferences; 0 if None.

    >>> ranking_losses(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0])).tolist()
    [0.6931471824645996]
    """
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -jax.nn.log_sigmoid(difference)


def safety_losses(
    scores: Float[Array, " B"], is_safe: Bool[Array, " B"]
) -> Float[Array, " B"]:
    """Compute the binary cross-entropy of σ(score) with a safety label.

        L = -log σ(r) if the answer is safe, else -log(1 - σ(r))

    The paper (arXiv:2307.09288, section 3.2.2) mentions an auxiliary safety loss
    without a formula; this one is our choice.

    >>> safety_losses(jnp.array([0.0]), jnp.array([True])).tolist()
    [0.6931471824645996]
    """
    return -jax.nn.log_sigmoid(jnp.where(is_safe, scores, -scores))


def policy_losses(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip: float = 0.2,
) -> Clipped:
    """Compute PPO's losses (Schulman et al., arXiv:1707.06347, equation 7).

        ρ = π(a) / π_old(a)        L = max(-ρ A, -clip(ρ, 1 - ε, 1 + ε) A)

    Args:
      logprobs: of the policy that is trained.
      old_logprobs: of the same tokens, from the same program, before the first update.
      advantages: A of each token.
      mask: sampled tokens.
      clip: ε.

    >>> one = jnp.ones((1, 1))
    >>> policy_losses(one, one, 2 * one, one > 0).losses.tolist()
    [[-2.0]]
    """
    ratio = jnp.exp(jnp.where(mask, logprobs - old_logprobs, 0.0))
    advantages = jnp.where(mask, advantages, 0.0)
    losses = -ratio * advantages
    clipped = -jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    return Clipped(jnp.maximum(losses, clipped), clipped > losses)


def value_losses(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip: float = 0.2,
) -> Clipped:
    """Compute a critic's losses, clipped as the policy's are.

        L = ½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)

    Args:
      values: V of the critic that is trained.
      old_values: V_old, before the first update.
      returns: R of each token.
      mask: sampled tokens.
      clip: ε.

    >>> one = jnp.ones((1, 1))
    >>> value_losses(one, one, 0 * one, one > 0).losses.tolist()
    [[0.5]]
    """
    values, old_values, returns = (
        jnp.where(mask, array, 0.0) for array in (values, old_values, returns)
    )
    near = jnp.clip(values, old_values - clip, old_values + clip)
    losses, clipped = 0.5 * (values - returns) ** 2, 0.5 * (near - returns) ** 2
    return Clipped(jnp.maximum(losses, clipped), clipped > losses)


def kl_estimates(
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
) -> Float[Array, "B T"]:
    """Estimate KL(π ‖ π₀) from tokens that π sampled, to report it.

        k3 = exp(-d) - 1 + d        d = log π(a) - log π₀(a)

    It is unbiased and never negative. It is no loss: its gradient, with the tokens
    given, is not that of the KL divergence. `estimators.token_rewards` has the penalty.

    >>> one = jnp.ones((1, 1))
    >>> kl_estimates(one, one, one > 0).tolist()
    [[0.0]]
    """
    difference = jnp.where(mask, logprobs - reference_logprobs, 0.0)
    return jnp.expm1(-difference) + difference


def dpo_losses(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    margin: Float[Array, " B"] | None = None,
    *,
    beta: float = 0.1,
) -> Float[Array, " B"]:
    """Compute the loss of direct preferences (arXiv:2305.18290, equation 7).

        L = -log σ(β [log π(y_c)/π₀(y_c) - log π(y_r)/π₀(y_r)] - m)

    Args:
      chosen: log-probability of each preferred answer, the sum over its tokens.
      rejected: of the others.
      reference_chosen: of the preferred answers under the initial policy π₀.
      reference_rejected: of the others under π₀.
      margin: m, as in `ranking_losses`.
      beta: β.

    >>> log = jnp.array([-3.0])
    >>> dpo_losses(log, log, log, log).tolist()
    [0.6931471824645996]
    """
    rewards = (chosen - reference_chosen, rejected - reference_rejected)
    return ranking_losses(beta * rewards[0], beta * rewards[1], margin)


def ipo_losses(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    reference_chosen: Float[Array, " B"],
    reference_rejected: Float[Array, " B"],
    *,
    beta: float = 0.1,
) -> Float[Array, " B"]:
    """Compute the loss of identity preferences (Azar et al., arXiv:2310.12036, eq. 17).

        L = (log π(y_c)/π₀(y_c) - log π(y_r)/π₀(y_r) - 1 / (2 β))²

    Args are those of `dpo_losses`.

    >>> log = jnp.array([-3.0])
    >>> ipo_losses(log, log, log, log).tolist()
    [25.0]
    """
    difference = (chosen - reference_chosen) - (rejected - reference_rejected)
    return (difference - 1 / (2 * beta)) ** 2
