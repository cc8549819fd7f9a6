"""`PolicyConfig`: settings of policy optimization."""

import dataclasses
import math
from typing import Literal, get_args

import optax

from llama_jax.errors import ConfigError
from llama_jax.train.optimizer import ScheduleName
from llama_jax.train.run_config import RunConfig

Estimator = Literal["gae", "rloo", "grpo"]
"""How advantages are estimated: by a critic, or from other answers to a prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(RunConfig):
    """Settings of policy optimization; a step of the run is an iteration.

    An iteration samples answers, rewards them, and updates the policy once or several
    times. Defaults are the Llama 2 paper's (arXiv:2307.09288, section 3.3): batches of
    512 answers, mini-batches of 64, clip 0.2, β 0.01 (7B and 13B), rate 1e-6.

    Attributes:
      batch_size: answers of an iteration.
      mini_batch: answers of an update; a divisor of `batch_size`.
      passes: over the answers of an iteration.
      num_samples: K, answers to each prompt; a divisor of `batch_size`, and at least 2
        for "rloo" and "grpo".
      estimator: "gae" is PPO with a critic; "rloo" and "grpo" compare answers.
      kl_coefficient: β of the penalty in the rewards.
      clip_ratio: ε of the policy's ratio.
      clip_value: ε of the critic's values.
      discount: γ of "gae".
      decay: λ of "gae".
      whiten_rewards: shift and scale the scores of an iteration to mean 0 and standard
        deviation 1, as the paper does.
      temperature: of samples and log-probabilities.
      max_new_tokens: most tokens of an answer.
      seq_length: T, slots of a prompt with its answer.
      critic_learning_rate: peak rate of the critic.

    Raises:
      ConfigError: a value is out of range.

    >>> config = PolicyConfig(steps=200, estimator="rloo", num_samples=4)
    >>> config.prompts_per_step, config.updates_per_step
    (128, 8)
    """

    batch_size: int = 512
    learning_rate: float = 1e-6
    schedule: ScheduleName = "constant"
    warmup: int | None = 0
    mini_batch: int = 64
    passes: int = 1
    num_samples: int = 1
    estimator: Estimator = "gae"
    kl_coefficient: float = 0.01
    clip_ratio: float = 0.2
    clip_value: float = 0.2
    discount: float = 1.0
    decay: float = 0.95
    whiten_rewards: bool = True
    temperature: float = 1.0
    max_new_tokens: int = 256
    seq_length: int = 1024
    critic_learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.estimator not in get_args(Estimator):
            raise ConfigError(
                f"estimator: must be one of {', '.join(get_args(Estimator))}, got "
                f"{self.estimator!r}"
            )
        for name in (
            "mini_batch", "passes", "num_samples", "max_new_tokens", "seq_length",
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name}: must be a positive integer, got {value!r}")
        for name, low, high in (
            ("kl_coefficient", 0.0, math.inf),
            ("discount", 0.0, 1.0),
            ("decay", 0.0, 1.0),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"{name}: must be between {low:g} and {high:g}, got "
                    f"{getattr(self, name)!r}"
                )
        for name in ("clip_ratio", "clip_value", "temperature", "critic_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"{name}: must be positive, got {getattr(self, name)!r}"
                )
        for name in ("mini_batch", "num_samples"):
            if self.batch_size % getattr(self, name):
                raise ConfigError(
                    f"{name}: {getattr(self, name)} does not divide batch_size "
                    f"{self.batch_size}; choose a divisor"
                )
        if self.mini_batch % self.accumulate:
            raise ConfigError(
                f"accumulate: {self.accumulate} does not divide mini_batch "
                f"{self.mini_batch}; choose a divisor"
            )
        if self.estimator != "gae" and self.num_samples < 2:
            raise ConfigError(
                f"num_samples: {self.estimator} compares answers to the same prompt, "
                "so it needs at least 2"
            )

    @property
    def prompts_per_step(self) -> int:
        """Prompts of an iteration."""
        return self.batch_size // self.num_samples

    @property
    def updates_per_step(self) -> int:
        """Updates of an iteration."""
        return self.passes * self.batch_size // self.mini_batch

    @property
    def normalizer(self) -> float | None:
        """See `policy.policy_sums`."""
        return None if self.estimator == "gae" else float(self.max_new_tokens)

    def make_optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of policy and critic, each with its own rate and clipping."""
        updates = steps * self.updates_per_step
        optimizers = {"policy": RunConfig.make_optimizer(self, updates)}
        if self.estimator == "gae":
            critic = dataclasses.replace(self, learning_rate=self.critic_learning_rate)
            optimizers["critic"] = RunConfig.make_optimizer(critic, updates)
        return optax.multi_transform(optimizers, {name: name for name in optimizers})
