"""Learning from a programmatic reward: reward against KL, sample by sample."""

import csv
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.data.batch import Batch
from llama_jax.distributed import to_host
from llama_jax.generation.request import text_request
from llama_jax.generation.sampling import Sampling
from llama_jax.loading import Opened
from llama_jax.model.transformer import Llama
from llama_jax.rlhf.losses import kl_estimates
from llama_jax.rlhf.optimization import optimize_policy
from llama_jax.rlhf.policy import target_logprobs
from llama_jax.rlhf.policy_config import Estimator, PolicyConfig
from llama_jax.rlhf.prompts import PromptSource
from llama_jax.rlhf.rewards import FunctionReward
from llama_jax.rlhf.rollout import Rollout, load_rollout, sample_rollout
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.train.methods import Method, train_weights
from llama_jax.train.run import run
from llama_jax.train.run_config import RunConfig
from llama_jax.train.state import init_state

METHODS = ("rejection", *get_args(Estimator))
"""Rejection sampling with fine-tuning on the best answers, and the estimators."""

PROMPTS = (
    "Once upon a time", "One day, a girl", "There was a big dog", "The boy went",
    "In the garden", "Mom and Dad", "A little bird", "Tom had a red ball",
    "It was a cold day", "The cat wanted", "Lily found a box", "Ben and his friend",
    "At the park", "The old man", "In the morning", "A small fish",
)  # fmt: skip

_RUNTIME = Runtime(param_dtype="float32", rules=TRAINING_RULES)


class Point(NamedTuple):
    """The answers of an iteration.

    Attributes:
      samples: number of answers that the policy has been trained on.
      reward: mean reward.
      kl: mean estimate of KL(policy ‖ initial policy) of a whole answer, in nats.
    """

    samples: int
    reward: float
    kl: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """The points of one run."""

    method: str
    seed: int
    points: Sequence[Point]


def share_of_s(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Return the share of an answer's words that begin with s.

    >>> share_of_s([""], ["She saw a star."])
    [0.75]
    """
    words = [answer.lower().split() for answer in answers]
    return [sum(w.startswith("s") for w in one) / max(len(one), 1) for one in words]


REWARD = FunctionReward(share_of_s)


def policy_config(iterations: int, estimator: Estimator, seed: int) -> PolicyConfig:
    """Return the settings that all methods share.

    Each iteration samples 4 answers of 16 tokens to each of 8 prompts.
    """
    return PolicyConfig(
        steps=iterations, batch_size=32, mini_batch=16, num_samples=4,
        estimator=estimator, learning_rate=3e-4, critic_learning_rate=1e-3,
        weight_decay=0.0, max_new_tokens=16, seq_length=32, seed=seed,
        save_every=iterations,
    )  # fmt: skip


def measure_curves(
    opened: Opened, *, seeds: int, iterations: int, methods: Sequence[str] = METHODS
) -> list[Curve]:
    """Run every method with every seed, from the same weights and prompts.

    Args:
      opened: the initial policy.
      seeds: number of runs of each method.
      iterations: of a run.
      methods: among `METHODS`.
    """
    curves = []
    for method in methods:
        for seed in range(seeds):
            if method == "rejection":
                rollouts = _rejection(opened, policy_config(iterations, "rloo", seed))
            else:
                estimator = next(e for e in get_args(Estimator) if e == method)
                config = policy_config(iterations, estimator, seed)
                rollouts = _optimization(opened, config)
            curves.append(Curve(method, seed, _points(opened, rollouts)))
    return curves


def _optimization(
    opened: Opened, config: PolicyConfig
) -> list[tuple[Rollout, np.ndarray]]:
    """Run PPO, RLOO or GRPO; returns its rollouts and their rewards."""
    policy = train_weights(opened.config, _RUNTIME, opened=opened)
    critic = None
    if config.estimator == "gae":
        scalar = opened.config.replace(head="scalar")
        critic = train_weights(scalar, _RUNTIME, opened=opened, seed=config.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "run"
        method = optimize_policy(
            config, policy, REWARD, PROMPTS, opened.tokenizer, folder, critic=critic
        )
        source = PromptSource(len(PROMPTS), config.prompts_per_step, config.seed)
        run(config, method, source, folder, tokenizer=opened.tokenizer)
        return [load_rollout(file) for file in sorted(folder.glob("rollouts/*.npz"))]


def _rejection(
    opened: Opened, config: PolicyConfig
) -> list[tuple[Rollout, np.ndarray]]:
    """Fine-tune on the best answer to each prompt, with as many updates."""
    method = train_weights(opened.config, _RUNTIME, opened=opened)
    assert config.steps is not None
    optimizer = RunConfig.make_optimizer(config, config.steps * config.updates_per_step)
    step = method.make_step(optimizer, 1)
    state = init_state(method.init(), optimizer)
    source = PromptSource(len(PROMPTS), config.prompts_per_step, config.seed)
    rollouts = []
    for iteration, batch in zip(range(config.steps), source, strict=False):
        rollout, rewards = _sample(
            method, state.params, opened, config, iteration, np.asarray(batch.numbers)
        )
        rollouts.append((rollout, rewards))
        best = rewards.reshape(-1, config.num_samples).argmax(axis=1)
        rows = best + config.num_samples * np.arange(config.prompts_per_step)
        tokens, targets, mask = (array[rows] for array in rollout[:3])
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        arrays = [tokens, targets, mask.astype(np.float32), np.ones_like(tokens)]
        chosen = Batch(*map(jnp.asarray, (*arrays, positions)))
        for _ in range(config.updates_per_step):
            state, _ = step(state, method.frozen, chosen)
    return rollouts


def _sample(
    method: Method,
    trained: dict[str, object],
    opened: Opened,
    config: PolicyConfig,
    iteration: int,
    numbers: np.ndarray,
) -> tuple[Rollout, np.ndarray]:
    prompts = [PROMPTS[number] for number in numbers]
    seeds = np.random.SeedSequence([config.seed, iteration]).generate_state(
        len(prompts)
    )
    requests = [
        text_request(
            opened.tokenizer,
            prompt,
            max_new_tokens=config.max_new_tokens,
            num_samples=config.num_samples,
            sampling=Sampling(temperature=1.0, top_p=1.0, seed=int(seed)),
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    rollout, answers = sample_rollout(
        method.for_generation(trained, opened.tokenizer),
        requests,
        prompts,
        temperature=1.0,
        length=config.seq_length,
    )
    return rollout, REWARD(answers)


def _points(
    opened: Opened, rollouts: Sequence[tuple[Rollout, np.ndarray]]
) -> list[Point]:
    method = train_weights(opened.config, _RUNTIME, opened=opened)
    model, params = method.model, method.init()
    assert isinstance(model, Llama)
    reference = jax.jit(functools.partial(target_logprobs, model, temperature=1.0))
    points, samples = [], 0
    for rollout, rewards in rollouts:
        rows = jnp.asarray(rollout.tokens), jnp.asarray(rollout.targets)
        logprobs = reference(params, *rows)
        estimates = kl_estimates(
            jnp.asarray(rollout.logprobs), logprobs, jnp.asarray(rollout.mask)
        )
        kl = float(to_host(jnp.sum(estimates))) / len(rewards)
        points.append(Point(samples, float(rewards.mean()), kl))
        samples += len(rewards)
    return points


def write_points(path: pathlib.Path, curves: Sequence[Curve]) -> None:
    """Write the points as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("method", "seed", *Point._fields))
        for curve in curves:
            for point in curve.points:
                numbers = (f"{point.reward:.5f}", f"{point.kl:.5f}")
                writer.writerow((curve.method, curve.seed, point.samples, *numbers))


def draw_points(path: pathlib.Path, curves: Sequence[Curve]) -> bool:
    """Draw reward against KL; return false if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(curve.method for curve in curves))
    for curve in curves:
        axes.plot(
            [point.kl for point in curve.points],
            [point.reward for point in curve.points],
            ".-",
            color=f"C{names.index(curve.method)}",
            alpha=0.7,
            label=curve.method if curve.seed == 0 else None,
        )
    axes.set(xlabel="KL from the initial policy, nats per answer", ylabel="mean reward")
    axes.legend()
    figure.savefig(path, dpi=100)
    return True
