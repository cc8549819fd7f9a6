"""Policy optimization: rollouts, exact ratios, and learning from a reward."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import TALKING, random_params, tiny_tokenizer

import llama_jax
from llama_jax.checkpoint.model_folder import Loaded, save_params
from llama_jax.errors import ConfigError, PromptError
from llama_jax.generation.sampling import Sampling
from llama_jax.model.transformer import Llama
from llama_jax.rlhf.optimization import PolicyMethod, optimize_policy
from llama_jax.rlhf.policy import PolicyBatch, policy_sums
from llama_jax.rlhf.policy_config import PolicyConfig
from llama_jax.rlhf.prompts import PromptSource
from llama_jax.rlhf.rewards import Answer
from llama_jax.rlhf.rollout import check_sampling, sample_rollout
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.train.methods import train_adapters, train_weights
from llama_jax.train.metrics import read_metrics
from llama_jax.train.shared_base import train_critic_on

PROMPTS = ("the", "tea", "he", "she", "a")
TARGET = 40
CONFIG = PolicyConfig(
    steps=6, batch_size=16, mini_batch=8, num_samples=4, learning_rate=1e-2,
    critic_learning_rate=1e-2, max_new_tokens=6, seq_length=16, weight_decay=0.0,
    save_every=2,
)  # fmt: skip


class TargetReward:
    """The share of sampled tokens below `TARGET`; counts its calls."""

    name = "target"
    calls = 0

    def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
        self.calls += 1
        shares = [np.mean(np.array(a.token_ids) < TARGET) for a in answers]
        return np.asarray(shares, np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    save_params(folder, random_params(TALKING), TALKING, tokenizer=tiny_tokenizer())
    return folder


def method(
    base: pathlib.Path,
    folder: pathlib.Path,
    config: PolicyConfig,
    reward: Any,
    dtype: Any = "float32",
) -> PolicyMethod:
    opened = llama_jax.open_model(base)
    runtime = Runtime(rules=TRAINING_RULES, dtype=dtype, param_dtype="float32")
    critic = None
    if config.estimator == "gae":
        scalar = TALKING.replace(head="scalar")
        critic = train_weights(scalar, runtime, opened=opened)
    policy = train_weights(opened.config, runtime, opened=opened)
    return optimize_policy(
        config, policy, reward, PROMPTS, opened.tokenizer, folder, critic=critic
    )


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_with_adapters_all_models_share_one_base_and_the_first_kl_is_exactly_0(
    base: pathlib.Path, tmp_path: pathlib.Path, quantize: Any
) -> None:
    config = dataclasses.replace(CONFIG, steps=2, mini_batch=CONFIG.batch_size)
    opened = llama_jax.open_model(base)
    runtime = Runtime(rules=TRAINING_RULES, dtype="bfloat16", remat="block")
    lora = llama_jax.Lora(rank=2, alpha=4.0)
    policy = train_adapters(opened, runtime, lora, quantize=quantize)
    critic = train_critic_on(policy)
    trained = optimize_policy(
        config, policy, TargetReward(), PROMPTS, opened.tokenizer, tmp_path,
        critic=critic,
    )  # fmt: skip
    assert trained.frozen["base"] is policy.frozen
    assert trained.frozen.keys() == {"base", "reference"}
    source = PromptSource(len(PROMPTS), config.prompts_per_step, config.seed)
    llama_jax.run(config, trained, source, tmp_path, tokenizer=opened.tokenizer)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["kl"], first["first_ratio_error"]) == (0.0, 0.0)
    assert second["kl"] > 0.0
    assert second["value_error"] > 0.0
    other = train_critic_on(train_adapters(opened, runtime, lora))
    weights = train_weights(TALKING.replace(head="scalar"), runtime, opened=opened)
    for wrong in (other, weights):
        with pytest.raises(ConfigError, match="share one set of weights"):
            optimize_policy(
                config, policy, TargetReward(), PROMPTS, opened.tokenizer, tmp_path,
                critic=wrong,
            )  # fmt: skip


def run(
    base: pathlib.Path,
    folder: pathlib.Path,
    config: PolicyConfig,
    reward: Any,
    dtype: Any = "float32",
    **options: Any,
) -> list[Any]:
    source = PromptSource(len(PROMPTS), config.prompts_per_step, config.seed)
    trained = method(base, folder, config, reward, dtype)
    llama_jax.run(
        config, trained, source, folder, tokenizer=tiny_tokenizer(), **options
    )
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("estimator", "dtype", "accumulate"),
    [("gae", "float32", 1), ("rloo", "bfloat16", 2), ("grpo", "float32", 2)],
)
def test_a_reward_rises_and_the_first_ratio_is_exactly_1(
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    estimator: Any,
    dtype: Any,
    accumulate: int,
) -> None:
    config = dataclasses.replace(
        CONFIG, estimator=estimator, steps=12, batch_size=64, mini_batch=16,
        accumulate=accumulate,
    )  # fmt: skip
    records = run(base, tmp_path / "run", config, TargetReward(), dtype)
    assert [record["first_ratio_error"] for record in records] == [0.0] * 12
    assert 0.0 <= records[0]["kl"] < records[-1]["kl"]
    bound = 1e-4 if dtype == "float32" else 0.5
    assert max(record["rollout_difference"] for record in records) < bound
    rewards = [record["reward"] for record in records]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1
    loaded = llama_jax.load(tmp_path / "run" / "model")
    assert isinstance(loaded.model, Llama)


def test_a_resumed_run_is_the_same_and_asks_for_no_reward_twice(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(CONFIG, estimator="rloo", temperature=0.8)
    whole = run(base, tmp_path / "whole", config, TargetReward())

    class Killed(Exception):
        pass

    class Killing(TargetReward):
        def __call__(self, answers: Sequence[Answer]) -> np.ndarray:
            if self.calls == 4:
                raise Killed
            return super().__call__(answers)

    with pytest.raises(Killed):
        run(base, tmp_path / "cut", config, Killing())
    # The checkpoint is of step 4; of step 5 there is no rollout yet.
    (tmp_path / "cut" / "rollouts" / "000004.npz").write_bytes(
        (tmp_path / "whole" / "rollouts" / "000004.npz").read_bytes()
    )
    reward = TargetReward()
    resumed = run(base, tmp_path / "cut", config, reward, resume=True)
    assert reward.calls == 1
    for ours, theirs in zip(resumed, whole, strict=True):
        for name in ("loss", "reward", "kl", "grad_norm"):
            assert ours[name] == theirs[name], (ours["step"], name)


def test_rollouts_are_the_sampled_tokens_at_the_temperature() -> None:
    loaded = Loaded(Llama(TALKING, Runtime()), random_params(TALKING), tiny_tokenizer())
    exact = Sampling(temperature=1.0, top_p=1.0, seed=3)
    requests = [
        llama_jax.text_request(
            loaded.tokenizer, text, max_new_tokens=8, num_samples=3, sampling=exact
        )
        for text in ("the", "a tea")
    ]
    rollout, answers = sample_rollout(
        loaded, requests, ["the", "a tea"], temperature=0.7, length=20
    )
    assert [answer.prompt for answer in answers] == ["the"] * 3 + ["a tea"] * 3
    for row, answer in enumerate(answers):
        ids = [*answer.prompt_ids, *answer.token_ids]
        size = len(ids) - 1
        assert rollout.tokens[row, :size].tolist() == ids[:-1]
        assert rollout.targets[row, rollout.mask[row]].tolist() == list(
            answer.token_ids
        )
        assert answer.ended == (answer.token_ids[-1] in requests[0].stop_ids)
        logits, _ = llama_jax.apply(
            loaded.model, loaded.params, jnp.asarray([ids[:-1]])
        )
        logprobs = jax.nn.log_softmax(logits[0] / 0.7)
        expected = np.asarray(logprobs)[np.arange(size), ids[1:]]
        actual = rollout.logprobs[row, :size]
        sampled = rollout.mask[row, :size]
        np.testing.assert_allclose(actual[sampled], expected[sampled], atol=1e-4)
    with pytest.raises(PromptError, match="raise the sequence length"):
        sample_rollout(loaded, requests, ["the", "a"], temperature=1.0, length=3)


@pytest.mark.parametrize(
    "change",
    [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.1},
     {"logit_bias": {5: 1.0}}, {"temperature": 0.0}],
)  # fmt: skip
def test_sampling_that_changes_the_distribution_is_refused(change: Any) -> None:
    exact = {"temperature": 1.0, "top_p": 1.0}
    check_sampling(Sampling(**exact))
    with pytest.raises(ConfigError, match=f"sampling: {next(iter(change))} is"):
        check_sampling(Sampling(**(exact | change)))


def test_what_was_not_sampled_changes_no_bit_of_the_policys_loss() -> None:
    draw = np.random.default_rng(0)
    mask = np.arange(6)[None] < np.array([[2], [4], [6]])
    floats = draw.standard_normal((6, 3, 6)).astype(np.float32)
    ids = draw.integers(0, 50, (2, 3, 6)).astype(np.int32)

    def batch(floats: np.ndarray, ids: np.ndarray) -> PolicyBatch:
        return PolicyBatch(*map(jnp.asarray, (*ids, mask, *floats[1:])))

    def total(logprobs: Any, batch: PolicyBatch) -> Any:
        sums = policy_sums(logprobs, batch, clip=0.2, normalizer=8.0)
        return sums.total, sums

    gradient = jax.jit(jax.value_and_grad(total, has_aux=True))
    clean = gradient(jnp.asarray(floats[0]), batch(floats, ids))
    floats[1:, ~mask], ids[:, ~mask] = np.nan, 99
    dirty = gradient(jnp.asarray(floats[0]), batch(floats, ids))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert float(clean[0][1].weight) == 24


def test_prompts_come_once_an_epoch_and_continue_from_a_state() -> None:
    source = PromptSource(5, 2, seed=1)
    batches = iter(source)
    numbers = [number for _ in range(5) for number in next(batches).numbers.tolist()]
    assert sorted(numbers[:5]) == sorted(numbers[5:]) == list(range(5))
    state = json.loads(json.dumps(source.state()))
    after = next(batches).numbers.tolist()
    other = PromptSource(5, 2, seed=1)
    other.restore(state)
    assert next(iter(other)).numbers.tolist() == after
    with pytest.raises(ConfigError, match="there were 5"):
        PromptSource(6, 2).restore(state)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"estimator": "rloo", "num_samples": 1}, "needs at least 2"),
        ({"mini_batch": 5}, "mini_batch: 5 does not divide"),
        ({"num_samples": 3}, "num_samples: 3 does not divide"),
        ({"accumulate": 16}, "accumulate"),
        ({"temperature": 0.0}, "temperature: must be positive"),
        ({"decay": 1.5}, "decay: must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        dataclasses.replace(CONFIG, **change)


def test_a_critic_belongs_to_gae_alone(
    base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    opened = llama_jax.open_model(base)
    policy = train_weights(opened.config, Runtime(rules=TRAINING_RULES), opened=opened)
    tokenizer, reward = opened.tokenizer, TargetReward()
    with pytest.raises(ConfigError, match="gae needs a critic"):
        optimize_policy(CONFIG, policy, reward, PROMPTS, tokenizer, tmp_path)
    rloo = dataclasses.replace(CONFIG, estimator="rloo")
    with pytest.raises(ConfigError, match="rloo has no use for a critic"):
        optimize_policy(
            rloo, policy, reward, PROMPTS, tokenizer, tmp_path, critic=policy
        )
