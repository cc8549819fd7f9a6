"""Learning from preferences without a reward model: DPO and IPO."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.arguments import checked
from llama_jax.errors import ConfigError
from llama_jax.model.lora import adapt
from llama_jax.model.transformer import Llama, apply
from llama_jax.rlhf.losses import dpo_losses, ipo_losses
from llama_jax.rlhf.pairs import PairBatch
from llama_jax.train.losses import LossSums
from llama_jax.train.methods import Method
from llama_jax.types import Array, Float, Params

DirectLoss = Literal["dpo", "ipo"]
"""Which loss of the difference between implicit rewards."""


def answer_logprobs(
    model: Llama, params: Params, batch: PairBatch
) -> Float[Array, "B 2"]:
    """Compute the log-probability of each answer: the sum over its tokens alone.

    Logits exist for a chunk of tokens at a time, never for a whole batch.
    """
    rows = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    is_answer = batch.answer.reshape(rows.shape)
    losses = apply(model, params, rows, jnp.roll(rows, -1, axis=1), method="losses")
    # Slot t predicts token t + 1. What the last slot predicts is no token of the row.
    counts = jnp.roll(is_answer, -1, axis=1).at[:, -1].set(False)
    return -jnp.sum(jnp.where(counts, losses, 0.0), axis=1).reshape(-1, 2)


def preference_sums(
    logprobs: Float[Array, "B 2"],
    reference: Float[Array, "B 2"],
    batch: PairBatch,
    *,
    loss: DirectLoss,
    beta: float,
) -> LossSums:
    """Compute the loss from the log-probabilities of chosen and rejected answers.

    The implicit reward of an answer is β (log π - log π₀).

    Args:
      logprobs: under the policy π.
      reference: under the initial policy π₀.
      batch: its margins count for "dpo".
      loss: see `losses.dpo_losses` and `losses.ipo_losses`.
      beta: β.

    Returns:
      Sums. Its metrics are `accuracy` (share of pairs with the higher implicit reward
      for the chosen answer; equal ones count half), `margin` (mean difference of the
      rewards) and `chosen_reward` (mean reward of the chosen answers, which may fall
      while the margin rises).
    """
    (chosen, rejected), (old_chosen, old_rejected) = logprobs.T, reference.T
    if loss == "dpo":
        losses = dpo_losses(
            chosen, rejected, old_chosen, old_rejected, batch.margin, beta=beta
        )
    else:
        losses = ipo_losses(chosen, rejected, old_chosen, old_rejected, beta=beta)
    rewards = beta * (logprobs - reference)
    difference = rewards[:, 0] - rewards[:, 1]
    agrees = 0.5 * (1 + jnp.sign(difference))
    return LossSums(
        jnp.sum(losses * batch.weight),
        jnp.sum(batch.weight),
        {
            "accuracy": jnp.sum(agrees * batch.weight),
            "margin": jnp.sum(difference * batch.weight),
            "chosen_reward": jnp.sum(rewards[:, 0] * batch.weight),
        },
    )


@checked(ConfigError)
def prefer_directly(
    method: Method, *, loss: DirectLoss = "dpo", beta: float = 0.1
) -> Method:
    """Make a method that learns preferences with DPO or IPO.

    The reference is the initial policy, whose log-probabilities are computed in every
    step. It is the frozen weights: with adapters those below them, otherwise a copy.

    Args:
      method: of a language model, from `train_weights` or `train_adapters`.
      loss: see `preference_sums`.
      beta: how strongly the policy stays at its reference.

    Returns:
      A method of `PairBatch`es.

    Raises:
      ConfigError: the model has no language head, β is not positive, or there is no
        such loss.
    """
    method.model.config.check_head("lm", "learning preferences directly")
    if not 0 < beta < math.inf:
        raise ConfigError(f"beta: must be a positive number, got {beta!r}; try 0.1")
    model, lora = method.model, method.lora

    def sums(trained: Params, frozen: Params, batch: PairBatch) -> LossSums:
        assert isinstance(model, Llama)
        policy = trained
        if lora is not None:
            policy = adapt(frozen, trained, lora.scaling)
        reference = jax.lax.stop_gradient(answer_logprobs(model, frozen, batch))
        logprobs = answer_logprobs(model, policy, batch)
        return preference_sums(logprobs, reference, batch, loss=loss, beta=beta)

    frozen = method.init() if lora is None else method.frozen
    return dataclasses.replace(method, frozen=frozen, loss=sums)
