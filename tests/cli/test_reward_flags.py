"""The reward that the flags of a command choose."""

from collections.abc import Sequence

import numpy as np
import pytest
from support.models import TALKING, random_params, talking_model, tiny_tokenizer

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import reward_flags
from llama_jax.cli.parser import ArgumentParser
from llama_jax.errors import RewardError
from llama_jax.loading import load
from llama_jax.model.transformer import ScalarModel
from llama_jax.rlhf.rewards import (
    Answer,
    FunctionReward,
    JudgeReward,
    ModelReward,
    Reward,
    SafetyGatedReward,
)
from llama_jax.runtime import Runtime

ANSWERS = [
    Answer("the", "tea", (1, 5, 9), (7, 8, 2)),
    Answer("a", "he", (1, 4), (6, 2)),
]


def make(
    monkeypatch: pytest.MonkeyPatch, *argv: str, policy: Loaded | None = None
) -> Reward:
    """The reward of a command whose models, `one` and `two`, are random."""

    def load_random(path: str, **options: object) -> Loaded:
        config = TALKING.replace(head="scalar")
        seed = len(path)
        model = ScalarModel(config, Runtime())
        return Loaded(model, random_params(config, seed), tiny_tokenizer())

    monkeypatch.setattr(reward_flags, "load", load_random)
    parser = ArgumentParser(rules=reward_flags.RULES)
    reward_flags.add_reward_arguments(parser)
    return reward_flags.make_reward(parser.parse_args(argv), policy or talking_model())


@pytest.mark.parametrize(
    ("argv", "kind", "name"),
    [
        (("--reward", "operator:add"), FunctionReward, "operator:add"),
        (("--reward-model", "one"), ModelReward, "one"),
        (
            ("--reward-model", "one", "--safety-model", "safe"),
            SafetyGatedReward,
            "one gated by safe",
        ),
        (("--judge", "one"), JudgeReward, "judge one"),
    ],
)
def test_flags_choose_the_reward(
    monkeypatch: pytest.MonkeyPatch, argv: Sequence[str], kind: type, name: str
) -> None:
    reward = make(monkeypatch, *argv)
    assert isinstance(reward, kind)
    assert reward.name == name


def test_the_safety_model_is_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    both = make(monkeypatch, "--reward-model", "one", "--safety-model", "safe")
    assert isinstance(both, SafetyGatedReward)
    assert not np.array_equal(both.helpfulness(ANSWERS), both.safety(ANSWERS))


def test_a_reward_model_with_another_tokenizer_needs_a_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = load()
    with pytest.raises(RewardError, match="reward one: has another tokenizer than"):
        make(monkeypatch, "--reward-model", "one", policy=policy)
    argv = ("--reward-model", "one", "--reward-format", "llama2-chat")
    reward = make(monkeypatch, *argv, policy=policy)
    assert isinstance(reward, ModelReward)
    assert reward.format is not None
    assert reward.format.name == "llama2-chat"
