"""The loss of a policy and its critic on a mini-batch of a rollout."""

from typing import NamedTuple

import jax.numpy as jnp

from llama_jax.model.transformer import Llama, ScalarModel, apply
from llama_jax.rlhf.losses import kl_estimates, policy_losses, value_losses
from llama_jax.rlhf.rollout import with_temperature
from llama_jax.train.losses import LossSums
from llama_jax.types import Array, Bool, Float, Int, Params, Tokens


class PolicyBatch(NamedTuple):
    """A mini-batch of a rollout; entries where `mask` is false have no effect.

    Attributes:
      tokens, targets, mask: of the rollout.
      old_logprobs: of the targets, before the first update on this rollout.
      reference_logprobs: of the targets under the initial policy.
      advantages: of the targets.
      old_values: of the critic before the first update; 0 without a critic.
      returns: targets of the critic; 0 without one.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    old_logprobs: Float[Array, "B T"]
    reference_logprobs: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    old_values: Float[Array, "B T"]
    returns: Float[Array, "B T"]


def target_logprobs(
    model: Llama, params: Params, tokens: Tokens, targets: Tokens, temperature: float
) -> Float[Array, "B T"]:
    """Compute the log-probability of each target, through the chunked loss."""
    params = with_temperature(params, temperature)
    return -apply(model, params, tokens, targets, method="losses")


def token_values(
    critic: ScalarModel, params: Params, tokens: Tokens
) -> Float[Array, "B T"]:
    """Compute the critic's value before each target."""
    scalars, _ = apply(critic, params, tokens)
    return scalars.astype(jnp.float32)


def policy_sums(
    logprobs: Float[Array, "B T"],
    batch: PolicyBatch,
    *,
    clip: float,
    normalizer: float | None,
) -> LossSums:
    """Compute the policy's loss from the log-probabilities of the targets.

    Args:
      logprobs: of the policy that is trained.
      batch: the mini-batch.
      clip: ε of the clipped ratio.
      normalizer: the sum over tokens is divided by the number of rows times this
        constant, such as the limit of an answer's tokens; None divides by the number of
        sampled tokens. A constant does not weigh the tokens of short answers more.

    Returns:
      Sums. Its metrics are sums over sampled tokens: `tokens` counts them, `kl` is the
      estimate k3 of KL(policy ‖ reference), `entropy` is the estimate -log π(a),
      `clipped` counts clipped tokens, and `ratio_error` is |ρ - 1|.
    """
    mask = batch.mask
    logprobs = jnp.where(mask, logprobs, 0.0)
    losses, is_clipped = policy_losses(
        logprobs, batch.old_logprobs, batch.advantages, mask, clip=clip
    )
    ratio = jnp.exp(jnp.where(mask, logprobs - batch.old_logprobs, 0.0))
    count = jnp.sum(mask).astype(jnp.float32)
    weight = count if normalizer is None else jnp.float32(len(mask) * normalizer)
    estimates = kl_estimates(logprobs, batch.reference_logprobs, mask)
    return LossSums(
        jnp.sum(losses),
        weight,
        {
            "tokens": count,
            "kl": jnp.sum(estimates),
            "entropy": -jnp.sum(logprobs),
            "clipped": jnp.sum(is_clipped).astype(jnp.float32),
            "ratio_error": jnp.sum(jnp.abs(ratio - 1.0)),
        },
    )


def critic_sums(
    values: Float[Array, "B T"], batch: PolicyBatch, *, clip: float
) -> LossSums:
    """Compute the critic's loss; its metric `value_error` is the sum of (V - R)²."""
    losses, _ = value_losses(
        values, batch.old_values, batch.returns, batch.mask, clip=clip
    )
    difference = jnp.where(batch.mask, values - batch.returns, 0.0)
    count = jnp.sum(batch.mask).astype(jnp.float32)
    return LossSums(jnp.sum(losses), count, {"value_error": jnp.sum(difference**2)})
