"""Bugs that users of other libraries met, each with the tests that fail on it.

| bug | tests |
|---|---|
| score at a padded slot, then masked | `test_estimators`: `test_the_score_is_at_…`, `test_the_return_at_…` |
| score cast to integers; wrong number of rewards; NaN | `test_estimators`: `test_the_return_at_…`; `test_rewards`: `test_a_function_gets_…`, `test_what_is_no_reward_…`; here: `test_advantages_have_…` |
| pad id is EOS: answers begin and end elsewhere | here: `test_answers_begin_and_end_…`, `test_padding_changes_no_bit_…`, `test_wider_padding_…` |
| cut answers: EOS appended, EOS of the prompt counted | here: `test_answers_begin_and_end_…`; `test_optimization`: `test_rollouts_are_…` |
| padding in values, KL and advantages; NaN times 0 | here: `test_padding_changes_no_bit_…`, `test_advantages_ignore_…`; `test_losses`, `test_optimization`: `test_what_was_not_sampled_…` |
| sampled at one temperature, trained at another | here: `test_sampling_and_training_…`; `test_optimization`: `test_rollouts_are_…` |
| top-p, top-k in sampling alone | `test_optimization`: `test_sampling_that_changes_…` |
| rollout and trainer disagree | here: `test_sampling_and_training_…`; `test_optimization`: `test_a_reward_rises_…` |
| sign and gradient of KL | `test_estimators`: `test_the_penalty_has_…`; `test_losses`: `test_kl_estimates_…` |
| margins broadcast against scores | `test_losses`: `test_ranking_losses_…`; `test_reward_model`: `test_a_margin_belongs_…` |
| 1/length; mean of each micro-batch; length rewarded | here: `test_equivalent_runs_…`, `test_a_normalizer_…`; `test_preferences`: `test_agreement_is_counted_…` |
| DPO: prompt or padding counted, tokens across the boundary | `test_direct_preference`: `test_the_initial_policy_…`, `test_prompt_tokens_and_padding_…`, `test_no_token_spans_…` |
| whitening per part, or with a shifted mean | here: `test_whitening_on_a_mesh_…`, `test_advantages_are_whitened_…`; `test_estimators`: `test_combined_rewards_…` |
"""  # noqa: E501  (a table)

import dataclasses
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.models import TALKING, random_params, tiny_tokenizer

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.model.transformer import Llama
from llama_jax.rlhf import policy_models
from llama_jax.rlhf.estimators import whiten
from llama_jax.rlhf.iteration import Iteration
from llama_jax.rlhf.optimization import PolicyMethod, optimize_policy
from llama_jax.rlhf.policy import PolicyBatch, policy_sums, target_logprobs
from llama_jax.rlhf.policy_config import PolicyConfig
from llama_jax.rlhf.rewards import FunctionReward
from llama_jax.rlhf.rollout import Rollout, sample_rollout, save_rollout
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.sharding import make_mesh
from llama_jax.train.losses import LossSums
from llama_jax.train.methods import train_weights
from llama_jax.train.state import init_state

B, T, STEPS = 8, 16, 50
MASK = (np.arange(T) >= 3) & (
    np.arange(T) < np.array([4, 5, 6, 8, 10, 12, 14, T])[:, None]
)
CONFIG = PolicyConfig(
    steps=STEPS, batch_size=B, mini_batch=B, num_samples=4, learning_rate=1e-3,
    critic_learning_rate=1e-3, max_new_tokens=T, seq_length=T, passes=2,
)  # fmt: skip


def make_method(
    folder: pathlib.Path, config: PolicyConfig, mesh: Any = None
) -> PolicyMethod:
    """Policy, and a critic for "gae", with random weights."""
    runtime = Runtime(rules=TRAINING_RULES, dtype="float32", param_dtype="float32")
    policy = train_weights(TALKING, runtime, mesh=mesh)
    critic = None
    if config.estimator == "gae":
        critic = train_weights(TALKING.replace(head="scalar"), runtime, mesh=mesh)
    reward = FunctionReward(lambda prompts, answers: [0.0] * len(answers))
    return optimize_policy(
        config, policy, reward, ["the"], tiny_tokenizer(), folder, critic=critic
    )


def make_iteration(method: PolicyMethod, accumulate: int = 1) -> Iteration:
    config = method.setup.models.config
    return Iteration(method.setup, config.make_optimizer(STEPS), accumulate)


def draw_batch(length: int = T) -> PolicyBatch:
    """A mini-batch; slots from T on are padding."""
    draw = np.random.default_rng(0)
    ids = np.zeros((2, B, length), np.int32)
    ids[:, :, :T] = draw.integers(0, TALKING.vocab_size, (2, B, T))
    floats = np.zeros((5, B, length), np.float32)
    floats[:, :, :T] = draw.standard_normal((5, B, T))
    floats[:2] = floats[:2] * 0.1 - 4.5  # log-probabilities
    mask = np.zeros((B, length), bool)
    mask[:, :T] = MASK
    return PolicyBatch(*ids, mask, *floats)


@pytest.fixture(scope="module")
def method(tmp_path_factory: pytest.TempPathFactory) -> PolicyMethod:
    return make_method(tmp_path_factory.mktemp("run"), CONFIG)


@pytest.fixture(scope="module")
def gradient(method: PolicyMethod) -> Any:
    """Loss sums and gradients of policy and critic as functions of a batch."""
    trained = method.init()

    @jax.jit
    def of_batch(batch: PolicyBatch) -> Any:
        def total(trained: Any) -> Any:
            sums = method.loss(trained, method.frozen, batch)
            return sums.total, sums

        return jax.grad(total, has_aux=True)(trained)

    return of_batch


def test_padding_changes_no_bit_of_loss_gradient_and_metrics(gradient: Any) -> None:
    clean = draw_batch()
    padding = np.cumsum(MASK[:, ::-1], axis=1)[:, ::-1] == 0  # after the last token
    draw = np.random.default_rng(1)
    eos = tiny_tokenizer().eos_id
    for ids in (np.full((B, T), eos), draw.integers(0, TALKING.vocab_size, (B, T))):
        tokens = np.where(padding, ids, clean.tokens).astype(np.int32)
        targets = np.where(MASK, clean.targets, ids).astype(np.int32)
        floats = (np.where(MASK, array, np.nan) for array in clean[3:])
        dirty = PolicyBatch(tokens, targets, MASK, *map(np.float32, floats))
        jax.tree.map(np.testing.assert_array_equal, gradient(clean), gradient(dirty))


def test_wider_padding_changes_only_the_rounding(gradient: Any) -> None:
    grads, sums = gradient(draw_batch())
    wider_grads, wider_sums = gradient(draw_batch(T + 5))
    close = {"rtol": 1e-4, "atol": 1e-4}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close), grads, wider_grads
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **close), sums, wider_sums
    )


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_advantages_ignore_what_was_not_sampled(
    estimator: Any, tmp_path: pathlib.Path
) -> None:
    config = dataclasses.replace(CONFIG, estimator=estimator)
    batch, iteration = draw_batch(), make_iteration(make_method(tmp_path, config))
    rollout = Rollout(*batch[:4], np.ones(B, bool))
    rewards = np.linspace(-1, 1, B, dtype=np.float32)
    arrays = [batch.old_logprobs, batch.reference_logprobs, batch.old_values]
    dirty = [np.where(MASK, array, np.float32(np.nan)) for array in arrays]
    clean = iteration.advantages(rollout, rewards, *arrays)
    assert np.isfinite(clean[0]).all()
    jax.tree.map(
        np.testing.assert_array_equal,
        clean, iteration.advantages(rollout, rewards, *dirty),
    )  # fmt: skip


def test_advantages_have_the_fractions_of_scores(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, estimator="rloo", kl_coefficient=0.0)
    batch, iteration = draw_batch(), make_iteration(make_method(tmp_path, config))
    rollout = Rollout(*batch[:4], np.ones(B, bool))
    rewards = np.float32([0.3, 0, 0, 0, 0.9, 0.9, 0.9, 0])
    advantages, _ = iteration.advantages(rollout, rewards, *batch[3:6])
    expected = np.array([0.3, -0.1, -0.1, -0.1, 0.3, 0.3, 0.3, -0.9])
    expected = np.where(MASK, expected[:, None], 0.0)
    np.testing.assert_allclose(advantages, expected, atol=1e-6)


def test_advantages_are_whitened_over_the_whole_rollout(method: PolicyMethod) -> None:
    batch, iteration = draw_batch(), make_iteration(method)
    rollout = Rollout(*batch[:4], np.ones(B, bool))
    rewards = np.linspace(-1, 1, B, dtype=np.float32)
    advantages, _ = iteration.advantages(rollout, rewards, *batch[3:6])
    sampled = advantages[MASK].astype(np.float64)
    np.testing.assert_allclose([sampled.mean(), sampled.std()], [0, 1], atol=1e-5)
    assert abs(advantages[: B // 2][MASK[: B // 2]].mean()) > 0.01


@pytest.mark.parametrize("keep_mean", [True, False])
def test_whitening_on_a_mesh_equals_numpy(keep_mean: bool) -> None:
    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    values = np.random.default_rng(0).standard_normal((B, T)).astype(np.float32) + 3
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays = (jax.device_put(array, rows) for array in (values, MASK))
    actual = jax.jit(lambda v, m: whiten(v, m, keep_mean=keep_mean))(*arrays)
    sampled = values[MASK].astype(np.float64)
    expected = (sampled - sampled.mean()) / sampled.std() + keep_mean * sampled.mean()
    np.testing.assert_allclose(np.asarray(actual)[MASK], expected, atol=1e-5)


def test_sampling_and_training_have_the_same_probabilities_at_a_temperature() -> None:
    """The prompt has BOS and EOS inside, as a dialog of several turns has."""
    tokenizer = tiny_tokenizer()
    model, params = Llama(TALKING, Runtime()), random_params(TALKING)
    turn = (tokenizer.bos_id, 9, 5, tokenizer.eos_id)
    request = Request(
        prompt_ids=(*turn, *turn, tokenizer.bos_id, 7), max_new_tokens=6,
        stop_ids=(tokenizer.eos_id,), num_samples=4,
        sampling=Sampling(temperature=1.0, top_p=1.0, seed=1),
    )  # fmt: skip
    rollout, _ = sample_rollout(
        Loaded(model, params, tokenizer), [request], ["the"], length=20,
        temperature=0.6,
    )  # fmt: skip
    tokens, targets = map(jnp.asarray, (rollout.tokens, rollout.targets))
    logprobs = target_logprobs(model, params, tokens, targets, 0.6)
    difference = np.asarray(logprobs) - rollout.logprobs
    np.testing.assert_allclose(difference[rollout.mask], 0.0, atol=1e-4)


@pytest.mark.parametrize("ends", [True, False])
def test_answers_begin_and_end_where_they_were_sampled(ends: bool) -> None:
    tokenizer = tiny_tokenizer()
    loaded = Loaded(Llama(TALKING, Runtime()), random_params(TALKING), tokenizer)
    turn = (tokenizer.bos_id, 9, 5, tokenizer.eos_id)
    every = tuple(range(TALKING.vocab_size))
    request = Request(
        prompt_ids=(*turn, *turn), max_new_tokens=6, stop_ids=every if ends else (),
        sampling=Sampling(temperature=1.0, top_p=1.0, seed=1),
    )  # fmt: skip
    rollout, [answer] = sample_rollout(
        loaded, [request], ["the"], temperature=1.0, length=20
    )
    size = 1 if ends else 6
    assert (len(answer.token_ids), answer.ended) == (size, ends)
    assert rollout.ended.tolist() == [ends]
    assert np.flatnonzero(rollout.mask).tolist() == list(range(7, 7 + size))
    assert rollout.targets[rollout.mask].tolist() == list(answer.token_ids)


def record_rollouts(folder: pathlib.Path) -> None:
    """Write rollouts in whose rewards length counts, for all iterations of a run."""
    for number in range(STEPS):
        draw = np.random.default_rng(number)
        lengths = draw.integers(1, T - 2, B)
        slots = np.arange(T)
        mask = (slots >= 2) & (slots < 2 + lengths[:, None])
        ids = draw.integers(3, TALKING.vocab_size, (B, T + 1)).astype(np.int32)
        rollout = Rollout(
            ids[:, :-1], ids[:, 1:], mask, np.zeros((B, T), np.float32),
            np.ones(B, bool),
        )  # fmt: skip
        rewards = (0.2 * lengths + draw.standard_normal(B)).astype(np.float32)
        save_rollout(folder / "rollouts" / f"{number:06d}.npz", rollout, rewards)


def curves(
    folder: pathlib.Path, config: PolicyConfig, accumulate: int = 1, mesh: Any = None
) -> np.ndarray:
    """Loss and KL of all iterations on the recorded rollouts, `[STEPS, 2]`."""
    method = make_method(folder, config, mesh)
    iteration = make_iteration(method, accumulate)
    state = init_state(method.init(), config.make_optimizer(STEPS))
    records = []
    for _ in range(STEPS):
        batch = types.SimpleNamespace(numbers=np.zeros(config.prompts_per_step, int))
        state, metrics = iteration(state, method.frozen, batch)
        records.append((float(metrics.loss), float(metrics.metrics["kl"])))
    return np.array(records)


def interval(residuals: np.ndarray, block: int = 10) -> np.ndarray:
    """95 % interval of the mean, from a bootstrap of circular blocks."""
    draw = np.random.default_rng(0)
    starts = draw.integers(0, STEPS, (2000, STEPS // block))
    index = (starts[..., None] + np.arange(block)) % STEPS
    return np.quantile(residuals[index].mean(axis=(1, 2)), [0.025, 0.975])


def has_drift(curve: np.ndarray, other: np.ndarray) -> bool:
    """Whether a curve is above or below another, by more than float32 resolves."""
    resolution = np.finfo(np.float32).eps * np.abs(curve).max(axis=0)
    for residuals, unit in zip((other - curve).T, resolution, strict=True):
        low, high = interval(residuals)
        if low > unit or high < -unit:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_equivalent_runs_have_the_same_curve(
    estimator: Any, tmp_path: pathlib.Path
) -> None:
    record_rollouts(tmp_path)
    config = dataclasses.replace(CONFIG, estimator=estimator)
    expected = curves(tmp_path, config)
    assert expected[-1, 1] > 1e-3  # KL: it has learnt
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    for accumulate, devices in ((2, None), (8, None), (1, mesh), (2, mesh)):
        actual = curves(tmp_path, config, accumulate, devices)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
        assert not has_drift(expected, actual), (accumulate, devices)


@pytest.mark.slow
def test_a_normalizer_of_length_gives_another_curve(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_rollouts(tmp_path)
    config = dataclasses.replace(CONFIG, estimator="rloo")
    expected = curves(tmp_path, config)

    def per_answer(logprobs: Any, batch: Any, **settings: Any) -> LossSums:
        lengths = jnp.sum(batch.mask, axis=1, keepdims=True)
        scaled = batch._replace(advantages=batch.advantages * T / lengths)
        return policy_sums(logprobs, scaled, **settings)

    def per_part(logprobs: Any, batch: Any, **settings: Any) -> LossSums:
        sums = policy_sums(logprobs, batch, **settings)
        count = sums.metrics["tokens"]
        return sums._replace(total=sums.total / count, weight=jnp.float32(1))

    monkeypatch.setattr(policy_models, "policy_sums", per_answer)
    assert has_drift(expected, curves(tmp_path, config))
    monkeypatch.setattr(policy_models, "policy_sums", per_part)
    assert has_drift(curves(tmp_path, config), curves(tmp_path, config, 4))
