"""An iteration of policy optimization: sample, reward, estimate, update."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llama_jax.data.order import shuffled
from llama_jax.distributed import from_host_rows, to_host
from llama_jax.generation.request import Request, chat_request, text_request
from llama_jax.generation.sampling import Sampling
from llama_jax.rlhf.estimators import gae, grpo, rloo, token_rewards, whiten
from llama_jax.rlhf.policy import PolicyBatch
from llama_jax.rlhf.policy_models import PolicyModels
from llama_jax.rlhf.rewards import Prompt, Reward
from llama_jax.rlhf.rollout import Rollout, load_rollout, sample_rollout, save_rollout
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.state import TrainState
from llama_jax.train.step import StepMetrics, make_train_step
from llama_jax.types import Array, Params, PyTree


@dataclasses.dataclass(frozen=True)
class PolicySetup:
    """What an iteration needs besides its state.

    Attributes:
      models: policy and critic.
      reward: of answers.
      tokenizer: of the policy.
      prompts: texts to continue, or dialogs to answer.
      format: prompt format of dialogs; None is the tokenizer's default.
      folder: of the run.
    """

    models: PolicyModels
    reward: Reward
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    format: str | None
    folder: pathlib.Path


class Iteration:
    """A `StepFunction`: sample, reward, and update."""

    def __init__(
        self,
        setup: PolicySetup,
        optimizer: optax.GradientTransformation,
        accumulate: int,
    ) -> None:
        self.setup, self.config = setup, setup.models.config
        self.rows = self.config.mini_batch // accumulate
        models = setup.models
        self.step = make_train_step(models.loss, optimizer, accumulate=accumulate)
        self.values = jax.jit(models.values)
        self.forward = jax.jit(models.logprobs)
        self.gradient = jax.jit(models.gradient_logprobs)
        self.is_exact: bool | None = None  # whether `forward` has `gradient`'s bits

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: PyTree
    ) -> tuple[TrainState, StepMetrics]:
        """Run an iteration; its number is `state.step`."""
        iteration = int(state.step)
        rollout, rewards = self.rollout(state, iteration, np.asarray(batch.numbers))
        trained = state.params
        base = frozen["base"]
        old = self.score(trained["policy"], base, rollout)
        reference = self.score(frozen["reference"], base, rollout)
        values = np.zeros_like(old)
        if self.setup.models.critic is not None:

            def of_rows(part: Rollout) -> Array:
                return self.values(trained["critic"], base, part)

            values = self.by_rows(of_rows, rollout)
        advantages, returns = self.advantages(rollout, rewards, old, reference, values)
        arrays: list[PyTree] = [
            rollout.tokens, rollout.targets, rollout.mask, old, reference, advantages,
            values, returns,
        ]  # fmt: skip
        metrics: list[StepMetrics] = []
        for rows in self.mini_batches(iteration):
            part = PolicyBatch(*(array[rows] for array in arrays))
            state, result = self.step(state, frozen, self.device_put(part))
            metrics.append(to_host(result))
        step = jax.device_put(np.int32(iteration + 1), state.step.sharding)
        state = state._replace(step=step)
        facts = self.facts(rollout, rewards, old)
        return state, _summary(metrics, facts)

    def rollout(
        self, state: TrainState, iteration: int, index: np.ndarray
    ) -> tuple[Rollout, np.ndarray]:
        """Sample and reward answers, or read those that a killed run has saved."""
        setup, config = self.setup, self.config
        path = setup.folder / "rollouts" / f"{iteration:06d}.npz"
        if path.exists():
            return load_rollout(path)
        prompts = [setup.prompts[number] for number in index]
        requests = [
            self.request(prompt, int(seed))
            for prompt, seed in zip(
                prompts,
                np.random.SeedSequence([config.seed, iteration]).generate_state(
                    len(prompts)
                ),
                strict=True,
            )
        ]
        policy = setup.models.policy.for_generation(
            state.params["policy"], setup.tokenizer
        )
        rollout, answers = sample_rollout(
            policy,
            requests,
            prompts,
            temperature=config.temperature,
            length=config.seq_length,
        )
        del policy
        rewards = setup.reward(answers)
        save_rollout(path, rollout, rewards)
        return rollout, rewards

    def request(self, prompt: Prompt, seed: int) -> Request:
        """The request of a prompt."""
        config, tokenizer = self.config, self.setup.tokenizer
        settings: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "num_samples": config.num_samples,
            "sampling": Sampling(temperature=1.0, top_p=1.0, seed=seed),
        }
        if isinstance(prompt, str):
            return text_request(tokenizer, prompt, **settings)
        return chat_request(tokenizer, prompt, format=self.setup.format, **settings)

    def score(self, trained: Params, frozen: Params, rollout: Rollout) -> np.ndarray:
        """Log-probabilities of the targets, with the bits of the gradient program.

        If the forward pass alone has other bits (checked once), the gradient is
        computed and dropped, at the price of a backward pass.
        """

        def forward(part: Rollout) -> Array:
            return self.forward(trained, frozen, part)

        def gradient(part: Rollout) -> Array:
            return self.gradient(trained, frozen, part)[0]

        if self.is_exact is None:
            part = Rollout(*(leaf[: self.rows] for leaf in rollout))
            both = (self.by_rows(forward, part), self.by_rows(gradient, part))
            self.is_exact = bool(np.array_equal(*(x[part.mask] for x in both)))
        return self.by_rows(forward if self.is_exact else gradient, rollout)

    def by_rows(
        self, function: Callable[[PyTree], Array], rollout: Rollout
    ) -> np.ndarray:
        """Apply a function to as many rows at a time as the step does."""
        parts = []
        for first in range(0, len(rollout.tokens), self.rows):
            part = Rollout(*(leaf[first : first + self.rows] for leaf in rollout))
            parts.append(to_host(function(self.device_put(part))))
        return np.concatenate(parts)

    def device_put(self, batch: PyTree) -> PyTree:
        """Put rows on the devices."""
        model = self.setup.models.policy.model
        return from_host_rows(batch, model.mesh, model.runtime.rules)

    def advantages(
        self,
        rollout: Rollout,
        rewards: np.ndarray,
        old: np.ndarray,
        reference: np.ndarray,
        values: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Advantages of the tokens, and returns for the critic, `[N, T]`."""
        config, mask = self.config, jnp.asarray(rollout.mask)
        scores = jnp.asarray(rewards, jnp.float32)
        if config.estimator == "gae":
            scores = whiten(scores) if config.whiten_rewards else scores
        per_token = token_rewards(
            scores,
            jnp.asarray(old),
            jnp.asarray(reference),
            mask,
            kl_coefficient=config.kl_coefficient,
        )
        if config.estimator == "gae":
            estimated = gae(
                per_token,
                jnp.asarray(values),
                mask,
                discount=config.discount,
                decay=config.decay,
            )
            return to_host((whiten(estimated.advantages, mask), estimated.returns))
        totals = jnp.sum(per_token, axis=1).reshape(-1, config.num_samples)
        compared = rloo(totals) if config.estimator == "rloo" else grpo(totals)
        tokens = jnp.where(mask, compared.reshape(-1)[:, None], 0.0)
        return to_host((tokens, jnp.zeros_like(tokens)))

    def mini_batches(self, iteration: int) -> Iterator[np.ndarray]:
        """Row numbers of each update, in an order that depends on the seed alone."""
        config = self.config
        for number in range(config.passes):
            key = (config.seed, iteration, number)
            order = shuffled(0, config.batch_size, config.batch_size, key=key)
            yield from order.reshape(-1, config.mini_batch)

    def facts(
        self, rollout: Rollout, rewards: np.ndarray, old: np.ndarray
    ) -> dict[str, float]:
        """Numbers of the rollout."""
        difference = np.where(rollout.mask, old - rollout.logprobs, 0.0)
        return {
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std()),
            "length": float(rollout.lengths.mean()),
            "truncated": float(1.0 - rollout.ended.mean()),
            "rollout_difference": float(np.abs(difference).max()),
            "scored_forward": float(bool(self.is_exact)),
        }


def _summary(metrics: Sequence[StepMetrics], facts: Mapping[str, float]) -> StepMetrics:
    """One record of all updates of an iteration."""
    means: dict[str, float] = dict(facts)
    for name in metrics[0].metrics:
        if name == "tokens":
            continue
        # Metrics are divided by the loss's weight, which may be a constant.
        of_updates = [float(m.metrics[name] / m.metrics["tokens"]) for m in metrics]
        means[name] = float(np.mean(of_updates))
        if name == "ratio_error":
            means["first_ratio_error"] = of_updates[0]
    return StepMetrics(
        loss=jnp.float32(np.mean([float(m.loss) for m in metrics])),
        weight=jnp.float32(sum(float(m.weight) for m in metrics)),
        grad_norm=jnp.float32(np.mean([float(m.grad_norm) for m in metrics])),
        skipped=jnp.asarray(any(bool(m.skipped) for m in metrics)),
        metrics={name: jnp.float32(value) for name, value in means.items()},
    )
