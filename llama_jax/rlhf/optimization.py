"""Policy optimization: PPO with a critic, RLOO and GRPO, as the steps of a run.

    prompts ─▶ answers ─▶ rewards ─▶ saved ─▶ log-probabilities, values ─▶ advantages
       ▲                                                                       │
       └────────────────── policy and critic after all updates ◀── updates ◀──┘

`train.run.run` treats an iteration as a step, so that checkpoints, metrics, reports and
signals are those of fine-tuning.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import optax

from llama_jax.errors import ConfigError
from llama_jax.rlhf.iteration import Iteration, PolicySetup
from llama_jax.rlhf.policy_config import PolicyConfig
from llama_jax.rlhf.policy_models import PolicyModels
from llama_jax.rlhf.rewards import Prompt, Reward
from llama_jax.runtime import DType
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.methods import Method
from llama_jax.train.pump import StepFunction
from llama_jax.types import Params, Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyMethod(Method):
    """What policy optimization trains: a policy, and a critic for "gae".

    Trained leaves are `{"policy": …, "critic": …}`; see `optimize_policy`.
    """

    setup: PolicySetup

    def params(self, trained: Params) -> Params:
        """The policy's parameters."""
        return self.setup.models.policy.params(trained["policy"])

    def save(
        self,
        path: Path,
        trained: Params,
        *,
        tokenizer: Tokenizer | None = None,
        dtype: DType | None = None,
    ) -> None:
        """Save the policy."""
        policy = self.setup.models.policy
        policy.save(path, trained["policy"], tokenizer=tokenizer, dtype=dtype)

    def make_step(
        self, optimizer: optax.GradientTransformation, accumulate: int
    ) -> StepFunction:
        """Make an iteration."""
        return Iteration(self.setup, optimizer, accumulate)


def optimize_policy(
    config: PolicyConfig,
    policy: Method,
    reward: Reward,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    critic: Method | None = None,
    format: str | None = None,
) -> PolicyMethod:
    """Make the method of a run that optimizes a policy.

    Run it with `PromptSource(len(prompts), config.prompts_per_step, config.seed)`.

    Args:
      config: settings.
      policy: what is trained, from `train_weights` or `train_adapters`; its initial
        leaves are the reference.
      reward: of the answers.
      prompts: texts to continue, or dialogs to answer.
      tokenizer: of the policy.
      folder: of the run; rollouts and rewards are saved there before the first update
        on them, so that a resumed run never asks for a reward twice.
      critic: of the estimator "gae": a model with a scalar head, from `train_weights`,
        or from `train_critic_on` if the policy trains adapters.
      format: prompt format of dialogs; None is the tokenizer's default.

    Raises:
      ConfigError: the critic is missing or not needed, or has frozen weights of its
        own; there is no prompt, or there are several processes.
    """
    if (critic is None) == (config.estimator == "gae"):
        needs = "needs a" if critic is None else "has no use for a"
        raise ConfigError(f"estimator: {config.estimator} {needs} critic")
    if critic is not None:
        critic.model.config.check_head("scalar", "a critic")
        check_shares_base(policy, critic)
    if not prompts:
        raise ConfigError("prompts: there is none; give at least one")
    if jax.process_count() > 1:
        raise ConfigError(
            "policy optimization runs in one process, with any mesh of its devices; "
            "start one process"
        )
    policy.model.config.check_head("lm", "a policy")
    parts = {"policy": policy} | ({} if critic is None else {"critic": critic})
    models = PolicyModels(config, policy, critic)
    return PolicyMethod(
        model=policy.model,
        shapes={name: part.shapes for name, part in parts.items()},
        init=lambda: {name: part.init() for name, part in parts.items()},
        frozen={"base": policy.frozen, "reference": policy.init()},
        loss=models.loss,
        lora=policy.lora,
        fingerprint=policy.fingerprint,
        base_model=policy.base_model,
        setup=PolicySetup(
            models, reward, tokenizer, prompts, format, pathlib.Path(folder)
        ),
    )


def check_shares_base(policy: Method, critic: Method) -> None:
    """Raise a `ConfigError` if frozen weights of a critic are not the policy's.

    Either both train all their weights, or both train adapters on the same arrays.
    """
    ours, theirs = policy.lora is not None, critic.lora is not None
    if ours == theirs and (not ours or critic.frozen is policy.frozen):
        return
    raise ConfigError(
        f"critic: {'adapters on' if theirs else 'trains all of'} the weights "
        f"{critic.fingerprint}, the policy {'adapters on' if ours else 'all of'} the "
        f"weights {policy.fingerprint}; with adapters both share one set of weights "
        "(train_critic_on)"
    )
