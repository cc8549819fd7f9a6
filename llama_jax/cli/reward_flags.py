"""The flags of a reward, and the reward that they make."""

import argparse

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli.command import Group
from llama_jax.cli.parser import Rules, needs
from llama_jax.errors import RewardError
from llama_jax.loading import load
from llama_jax.rlhf.rewards import (
    JudgeReward,
    ModelReward,
    Reward,
    SafetyGatedReward,
    load_reward,
)
from llama_jax.text.prompt_formats import get_format
from llama_jax.text.tokenizer import Tokenizer

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
    kind.add_argument("--reward-model", metavar="DIR", help="a reward model")
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


def make_reward(args: argparse.Namespace, policy: Loaded) -> Reward:
    """Load the reward that the flags choose.

    Args:
      args: with the flags of `add_reward_arguments`.
      policy: whose answers are scored; reward models share its mesh and dtype.

    Raises:
      RewardError: there is no such function, or a reward model cannot read the
        policy's tokens.
    """
    if args.reward is not None:
        return load_reward(args.reward)
    if args.judge is not None:
        return JudgeReward(_load(args.judge, policy), name=f"judge {args.judge}")
    helpfulness = _model_reward(args.reward_model, args, policy)
    if args.safety_model is None:
        return helpfulness
    safety = _model_reward(args.safety_model, args, policy)
    name = f"{helpfulness.name} gated by {safety.name}"
    return SafetyGatedReward(helpfulness, safety, name=name)


def _model_reward(path: str, args: argparse.Namespace, policy: Loaded) -> ModelReward:
    loaded = _load(path, policy)
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


def _load(path: str, policy: Loaded) -> Loaded:
    return load(path, runtime=policy.model.runtime, mesh=policy.model.mesh)


def _pieces(tokenizer: Tokenizer, size: int) -> list[str]:
    unnamed = set(tokenizer.unnamed_ids(size))
    return ["" if id in unnamed else tokenizer.token_text(id) for id in range(size)]
