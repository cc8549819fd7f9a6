"""The models of policy optimization: the policy, its reference and its critic."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from llama_jax.model.lora import adapt
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.rlhf.policy import (
    PolicyBatch,
    critic_sums,
    policy_sums,
    target_logprobs,
    token_values,
)
from llama_jax.rlhf.policy_config import PolicyConfig
from llama_jax.train.losses import LossSums
from llama_jax.train.methods import Method
from llama_jax.types import Array, Float, Params, PyTree


@dataclasses.dataclass(frozen=True)
class PolicyModels:
    """Losses and outputs as functions of trained and frozen leaves.

    Trained leaves are `{"policy": …, "critic": …}`. Frozen ones are `"base"`, which all
    models share (empty if weights are trained), and `"reference"`: the policy's initial
    trained leaves.

    Attributes:
      config: settings.
      policy: what is trained.
      critic: for the estimator "gae".
    """

    config: PolicyConfig
    policy: Method
    critic: Method | None

    def loss(self, trained: Params, frozen: Params, batch: PolicyBatch) -> LossSums:
        """Compute the loss of policy and critic; a `train.losses.Loss`."""
        sums, _ = self._loss_and_logprobs(trained, frozen, batch)
        return sums

    def _loss_and_logprobs(
        self, trained: Params, frozen: Params, batch: PolicyBatch
    ) -> tuple[LossSums, Array]:
        logprobs = self.logprobs(trained["policy"], frozen["base"], batch)
        clip, normalizer = self.config.clip_ratio, self.config.normalizer
        sums = policy_sums(logprobs, batch, clip=clip, normalizer=normalizer)
        if self.critic is None:
            return sums, logprobs
        values = self.values(trained["critic"], frozen["base"], batch)
        of_critic = critic_sums(values, batch, clip=self.config.clip_value)
        total = sums.total + of_critic.total
        metrics = {**sums.metrics, **of_critic.metrics}
        return LossSums(total, sums.weight, metrics), logprobs

    def logprobs(
        self, trained: Params, frozen: Params, batch: PyTree
    ) -> Float[Array, "B T"]:
        """Compute log-probabilities of the targets under the policy or its reference.

        Args:
          trained: trained leaves of either.
          frozen: the base.
          batch: with `tokens` and `targets`.
        """
        assert isinstance(self.policy.model, Llama)
        return target_logprobs(
            self.policy.model,
            _whole(self.policy, trained, frozen),
            batch.tokens,
            batch.targets,
            self.config.temperature,
        )

    def gradient_logprobs(
        self, trained: Params, frozen: Params, batch: PyTree
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        """Compute the same inside the gradient of the loss, and the gradient's norm.

        A compiler may round the forward pass of a gradient in another way than that of
        the forward pass alone. Returning the norm keeps the gradient in the program.
        """
        zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
        whole = PolicyBatch(batch.tokens, batch.targets, batch.mask, *[zeros] * 5)

        def total(policy: Params) -> tuple[Array, Array]:
            logprobs = self.logprobs(policy, frozen, whole)
            advantages = jnp.ones_like(logprobs)
            given = whole._replace(advantages=advantages, old_logprobs=logprobs)
            given = jax.lax.stop_gradient(given)
            sums = policy_sums(
                logprobs, given, clip=self.config.clip_ratio, normalizer=1.0
            )
            return sums.total, logprobs

        grads, logprobs = jax.grad(total, has_aux=True)(trained)
        return logprobs, optax.tree.norm(grads)

    def values(
        self, trained: Params, frozen: Params, batch: PyTree
    ) -> Float[Array, "B T"]:
        """Compute the critic's value before each target."""
        assert self.critic is not None
        assert isinstance(self.critic.model, ScalarModel)
        params = _whole(self.critic, trained, frozen)
        return token_values(self.critic.model, params, batch.tokens)


def _whole(method: Method, trained: Params, frozen: Params) -> Params:
    """The parameters of a model from its trained and its frozen leaves."""
    if method.lora is None:
        return trained
    return adapt(frozen, trained, method.lora.scaling)
