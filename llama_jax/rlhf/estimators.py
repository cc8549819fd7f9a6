"""Rewards, advantages and returns: pure functions over the arrays of a rollout.

Arrays of tokens are `[B, T]` and aligned with targets: entry t is of the token that
follows slot t. `mask` is true at the tokens that the policy sampled. Other entries have
no effect on any result, even if they are NaN.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama_jax.types import Array, Bool, Float

_EPSILON = 1e-8  # added to standard deviations


class Advantages(NamedTuple):
    """What a policy and its critic learn from, 0 where nothing was sampled.

    Attributes:
      advantages: by how much each token was better than expected.
      returns: targets of the critic.
    """

    advantages: Float[Array, "B T"]
    returns: Float[Array, "B T"]


def combine_rewards(
    helpfulness: Float[Array, " B"],
    safety: Float[Array, " B"],
    is_safety_prompt: Bool[Array, " B"],
    *,
    gate: float = 0.15,
) -> Float[Array, " B"]:
    """Combine the scores of two reward models (arXiv:2307.09288, section 3.2.3).

        R_c = R_s if the prompt is a safety prompt or σ(R_s) < gate, else R_h

    The paper turns R_c, a probability, back into a logit. Scores are logits here, so
    the result is the chosen score itself, without rounding.

    Args:
      helpfulness: scores R_h of the helpfulness model (logits).
      safety: scores R_s of the safety model (logits).
      is_safety_prompt: whether each prompt is meant to provoke unsafe answers.
      gate: probability of being safe below which the safety score counts.

    Returns:
      The combined scores; `whiten` them for policy optimization.

    >>> scores = jnp.array([2.0, 2.0]), jnp.array([1.0, -3.0])
    >>> combine_rewards(*scores, jnp.array([False, False])).tolist()
    [2.0, -3.0]
    """
    threshold = math.log(gate) - math.log1p(-gate)
    return jnp.where(is_safety_prompt | (safety < threshold), safety, helpfulness)


def whiten(
    values: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None = None,
    *,
    keep_mean: bool = False,
) -> Float[Array, "*shape"]:
    """Scale values to standard deviation 1, and shift them to mean 0.

    Args:
      values: of a whole batch, not of a part of it.
      mask: the entries that count; all if None. The others become 0.
      keep_mean: leave the mean as it is.

    >>> whiten(jnp.array([1.0, 3.0])).tolist()
    [-1.0, 1.0]
    """
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    values = jnp.where(mask, values, 0.0)
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(values) / count
    variance = jnp.sum(jnp.where(mask, (values - mean) ** 2, 0.0)) / count
    scaled = (values - mean) / (jnp.sqrt(variance) + _EPSILON)
    return jnp.where(mask, scaled + mean * keep_mean, 0.0)


def token_rewards(
    scores: Float[Array, " B"],
    logprobs: Float[Array, "B T"],
    reference_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coefficient: float,
) -> Float[Array, "B T"]:
    """Compute rewards of tokens (arXiv:2307.09288, section 3.2.3, equation 4).

        r_t = -β (log π(a_t) - log π₀(a_t)) + [a_t is the last] R

    The sum over an answer is R - β log(π / π₀), whose expectation is the paper's
    R - β KL(π ‖ π₀). As a part of the reward, the estimate's policy gradient is that
    of the KL divergence itself.

    Args:
      scores: R of each answer; at least one token of it must be in `mask`.
      logprobs: of the policy that sampled the tokens.
      reference_logprobs: of the initial policy π₀.
      mask: sampled tokens.
      kl_coefficient: β.

    >>> mask = jnp.array([[False, True, True]])
    >>> zeros = jnp.zeros((1, 3))
    >>> token_rewards(jnp.array([0.3]), zeros, zeros, mask, kl_coefficient=0.1).tolist()
    [[0.0, 0.0, 0.30000001192092896]]
    """
    log_ratio = jnp.where(mask, logprobs - reference_logprobs, 0.0)
    following = jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]
    is_last = mask & (following == 1)
    scores = scores.astype(jnp.float32)[:, None]
    return -kl_coefficient * log_ratio + jnp.where(is_last, scores, 0.0)


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    discount: float = 1.0,
    decay: float = 0.95,
) -> Advantages:
    """Estimate advantages (Schulman et al., arXiv:1506.02438, equations 11 to 16).

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γ λ A_{t+1}

    V and A are 0 after the last sampled token, whether it ends the answer or the limit
    cut it: an answer that was cut gets no credit for what it might have become.

    Args:
      rewards: r of each token.
      values: V, the critic's expected sum of rewards before each token is sampled.
      mask: sampled tokens; the next sampled token follows, others are skipped.
      discount: γ.
      decay: λ; 1 gives the returns minus the values, 0 the one-step errors.

    >>> one = jnp.ones((1, 2))
    >>> gae(one, 0 * one, one > 0, decay=1.0).advantages.tolist()
    [[2.0, 1.0]]
    """
    rewards, values = jnp.where(mask, rewards, 0.0), jnp.where(mask, values, 0.0)

    def back(
        after: tuple[Array, Array], here: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array], Array]:
        (next_value, next_advantage), (reward, value, sampled) = after, here
        error = reward + discount * next_value - value
        advantage = error + discount * decay * next_advantage
        after = (
            jnp.where(sampled, value, next_value),
            jnp.where(sampled, advantage, next_advantage),
        )
        return after, jnp.where(sampled, advantage, 0.0)

    zeros = jnp.zeros(rewards.shape[0], rewards.dtype)
    columns = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(back, (zeros, zeros), columns, reverse=True)
    return Advantages(advantages.T, advantages.T + values)


def rloo(rewards: Float[Array, "P K"]) -> Float[Array, "P K"]:
    """Compare each answer with the other answers to its prompt (arXiv:2402.14740).

        A_k = R_k - mean of R_j over j ≠ k

    Args:
      rewards: of K ≥ 2 answers to each of P prompts, KL penalty included.

    >>> rloo(jnp.array([[1.0, 0.0, 0.0]])).tolist()
    [[1.0, -0.5, -0.5]]
    """
    count = rewards.shape[1]
    others = (jnp.sum(rewards, axis=1, keepdims=True) - rewards) / (count - 1)
    return rewards - others


def grpo(rewards: Float[Array, "P K"], *, scale: bool = True) -> Float[Array, "P K"]:
    """Compare each answer with all answers to its prompt (arXiv:2402.03300, 4.1).

        A_k = (R_k - mean R) / std R

    Args:
      rewards: of K ≥ 2 answers to each of P prompts.
      scale: divide by the standard deviation; without it, easy and hard prompts do not
        count more than others (arXiv:2503.20783).

    >>> grpo(jnp.array([[1.0, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """
    centered = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if not scale:
        return centered
    return centered / (jnp.std(rewards, axis=1, keepdims=True) + _EPSILON)
