"""Rewards: functions, models, the paper's combination, judges and sums."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import ConfigError, RewardError
from llama_jax.model.transformer import Llama, ScalarModel
from llama_jax.rlhf.rewards import (
    Answer,
    FunctionReward,
    JudgeReward,
    ModelReward,
    Reward,
    SafetyGatedReward,
    WeightedReward,
    load_reward,
)
from llama_jax.runtime import Runtime
from llama_jax.text.prompt_formats import get_format

ANSWERS = [
    Answer("the", "tea", (1, 5, 9), (7, 8, 2)),
    Answer("a", "he", (1, 4), (6, 2)),
    Answer([{"role": "user", "content": "she"}], "tea", (1, 9), (5, 5, 5), ended=False),
]


def lengths(prompts: list[Any], answers: list[str]) -> list[int]:
    return [len(answer) for answer in answers]


def test_a_function_gets_prompts_and_answers() -> None:
    calls: list[Any] = []

    def reward(prompts: list[Any], answers: list[str]) -> Any:
        calls.append((prompts, answers))
        return np.array([0.3, -1, 2])

    rewards = FunctionReward(reward)(ANSWERS)
    assert calls == [([a.prompt for a in ANSWERS], ["tea", "he", "tea"])]
    assert rewards.dtype == np.float32
    np.testing.assert_array_equal(rewards, np.array([0.3, -1, 2], np.float32))
    assert isinstance(FunctionReward(reward), Reward)


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        ([1.0], "returned 1 rewards for 3 answers"),
        ([1.0] * 4, "returned 4 rewards for 3 answers"),
        ([1.0, math.nan, 2.0], "returned nan for the answer 'he'"),
        ([1.0, 2.0, math.inf], "returned inf for the answer 'tea'"),
        ([1.0, None, 2.0], "returned None for the answer 'he'"),
        ([1.0, "2", 2.0], "returned '2' for the answer"),
        (None, "raised TypeError"),
    ],
)
def test_what_is_no_reward_is_refused_by_name(result: Any, complaint: str) -> None:
    with pytest.raises(RewardError, match=f"reward brevity: .*{complaint}"):
        FunctionReward(lambda prompts, answers: result, "brevity")(ANSWERS)


def test_functions_are_imported_by_name() -> None:
    assert load_reward("rlhf.test_rewards:lengths")(ANSWERS).tolist() == [3, 2, 3]
    for name, complaint in (
        ("lengths", "not of the form"),
        ("no_such_module:f", "importing no_such_module failed"),
        ("rlhf.test_rewards:ANSWERS", "has no function"),
    ):
        with pytest.raises(RewardError, match=complaint):
            load_reward(name)


@pytest.fixture(scope="module")
def reward_model() -> Loaded:
    config = TALKING.replace(head="scalar")
    model = ScalarModel(config, Runtime())
    return Loaded(model, random_params(config), tiny_tokenizer())


def test_a_reward_model_scores_the_last_token_whatever_the_company(
    reward_model: Loaded,
) -> None:
    reward = ModelReward(reward_model, batch_size=2)
    rewards = reward(ANSWERS)
    for answer, actual in zip(ANSWERS, rewards, strict=True):
        ids = jnp.asarray([[*answer.prompt_ids, *answer.token_ids]])
        scalars, _ = llama_jax.apply(reward_model.model, reward_model.params, ids)
        np.testing.assert_allclose(actual, scalars[0, -1], rtol=1e-5, atol=1e-6)
        assert reward([answer])[0] == actual
    written = ModelReward(reward_model, get_format("wizardlm-7b"))(ANSWERS)
    assert np.isfinite(written).all()
    long = Answer("a", "b", (1,), (5,) * TALKING.max_seq_len)
    with pytest.raises(RewardError, match="the reward model's context holds"):
        reward([long])
    language_model = Loaded(Llama(TALKING, Runtime()), {}, reward_model.tokenizer)
    with pytest.raises(ConfigError, match="needs a model with head 'scalar'"):
        ModelReward(language_model)


def test_safety_gates_helpfulness() -> None:
    helpful = FunctionReward(lambda p, a: [5.0, 6.0, 7.0], "helpful")
    safe = FunctionReward(lambda p, a: [1.0, -3.0, 2.0], "safe")
    combined = SafetyGatedReward(helpful, safe)(ANSWERS)
    assert combined.tolist() == [5.0, -3.0, 7.0]
    tagged = SafetyGatedReward(helpful, safe, lambda prompt: prompt == "the")
    assert tagged(ANSWERS).tolist() == [1.0, -3.0, 7.0]
    total = WeightedReward(((helpful, 0.5), (safe, -1.0)))
    assert total(ANSWERS).tolist() == [1.5, 6.0, 1.5]
    assert total.name == "0.5 helpful + -1 safe"


def test_a_judge_answers_with_log_odds() -> None:
    loaded = Loaded(
        Llama(TALKING.replace(max_seq_len=512), Runtime()),
        random_params(TALKING),
        tiny_tokenizer(),
    )
    question = "the {prompt} a {answer}"
    judge = JudgeReward(loaded, question, get_format("wizardlm-7b"))
    rewards = judge(ANSWERS)
    assert np.isfinite(rewards).all()
    assert len(set(rewards.tolist())) == 3
    assert judge(ANSWERS[1:2])[0] == rewards[1]
