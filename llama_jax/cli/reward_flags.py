"""The flags of a reward, and the reward that they make."""

import argparse

from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli.command import Group
from llama_jax.cli.parser import Rules, needs
from llama_jax.conversion.peft_base import is_adapter, read_base
from llama_jax.errors import RewardError
from llama_jax.loading import load, open_model
from llama_jax.rlhf.rewards import (
    JudgeReward,
    ModelReward,
    Reward,
    SafetyGatedReward,
    load_reward,
)
from llama_jax.text.prompt_formats import get_format
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.methods import Method
from llama_jax.train.shared_base import load_reward_model_on

RULES: Rules = {
    "--reward-format": needs("--reward-model"),
    "--safety-model": needs("--reward-model"),
}
"""When the flags have an effect."""


def add_reward_arguments(group: Group) -> None:
    """Add the flags of a reward, of which one is required."""
    kind = group.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="a Python function of a list of prompts and a list of answers, which "
        "returns a number for each",
    )
    kind.add_argument(
        "--reward-model",
        metavar="DIR",
        help="a reward model, or the adapter of one beside its checkpoint",
    )
    kind.add_argument(
        "--judge",
        metavar="DIR",
        help="a chat model that is asked whether an answer is good",
    )
    group.add_argument(
        "--safety-model",
        metavar="DIR",
        help="a second reward model, whose score replaces the first one's where it "
        "finds an answer unsafe, as in the Llama 2 paper",
    )
    group.add_argument(
        "--reward-format",
        metavar="NAME",
        help="prompt format of the reward models (default: they read the tokens as "
        "they were sampled)",
    )


def make_reward(
    args: argparse.Namespace, policy: Loaded, *, base: Method | None = None
) -> Reward:
    """Load the reward that the flags choose.

    Args:
      args: with the flags of `add_reward_arguments`.
      policy: whose answers are scored; reward models share its mesh and dtype.
      base: the policy in training; if it trains adapters, reward models that are
        adapters share its frozen weights.

    Raises:
      RewardError: there is no such function, or a reward model cannot read the
        policy's tokens.
      ConfigError: the adapters of a reward model were trained on other weights.
    """
    if args.reward is not None:
        return load_reward(args.reward)
    if args.judge is not None:
        return JudgeReward(_load(args.judge, policy), name=f"judge {args.judge}")
    helpfulness = _model_reward(args.reward_model, args, policy, base)
    if args.safety_model is None:
        return helpfulness
    safety = _model_reward(args.safety_model, args, policy, base)
    name = f"{helpfulness.name} gated by {safety.name}"
    return SafetyGatedReward(helpfulness, safety, name=name)


def _model_reward(
    path: str, args: argparse.Namespace, policy: Loaded, base: Method | None
) -> ModelReward:
    loaded = _load_model(path, policy, base)
    if args.reward_format is not None:
        style = get_format(args.reward_format, loaded.tokenizer)
        return ModelReward(loaded, style, name=path)
    size = policy.model.config.vocab_size
    if _pieces(loaded.tokenizer, size) != _pieces(policy.tokenizer, size):
        raise RewardError(
            f"reward {path}: has another tokenizer than the policy; give "
            "--reward-format, so that it reads answers as text"
        )
    return ModelReward(loaded, name=path)


def _load_model(path: str, policy: Loaded, base: Method | None) -> Loaded:
    if not is_adapter(path):
        return _load(path, policy)
    if base is not None and base.lora is not None:
        return load_reward_model_on(base, path, policy.tokenizer)
    named = read_base(path)
    if named.weights is None:
        raise RewardError(
            f"reward {path}: is an adapter that does not say of which weights; merge "
            "it into its checkpoint with `python -m llama_jax.finetune merge`"
        )
    weights = fingerprint(open_model(named.model).leaves)
    if weights != named.weights:
        raise RewardError(
            f"reward {path}: is an adapter of the weights {named.weights}, but "
            f"{named.model} has {weights}; restore that checkpoint"
        )
    return _load(named.model, policy, adapter=path)


def _load(path: str | None, policy: Loaded, *, adapter: str | None = None) -> Loaded:
    runtime, mesh = policy.model.runtime, policy.model.mesh
    return load(path, runtime=runtime, mesh=mesh, adapter=adapter)


def _pieces(tokenizer: Tokenizer, size: int) -> list[str]:
    unnamed = set(tokenizer.unnamed_ids(size))
    return ["" if id in unnamed else tokenizer.token_text(id) for id in range(size)]
