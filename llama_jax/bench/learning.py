"""What the stages of RLHF learn, measured on small models: all parts, or one."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from llama_jax.bench.policy_learning import (
    METHODS,
    Curve,
    draw_points,
    measure_curves,
    write_points,
)
from llama_jax.bench.preference_learning import (
    DirectResult,
    RatingResult,
    RewardResult,
    measure_dpo,
    measure_ratings,
    measure_reward_model,
    planted_pairs,
    read_pairs,
)
from llama_jax.errors import ConfigError
from llama_jax.loading import open_model

Part = Literal["policy", "ratings", "reward", "dpo"]
PARTS = get_args(Part)

_LENGTH = 96  # last tokens of a dialog
_PLANTED_LENGTH = 32
_PLANTED_PAIRS = 640
_LAST = 5  # iterations


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyResult:
    """A method's rewards.

    Attributes:
      first: mean reward of the initial policy's answers.
      last: mean reward over the last 5 iterations of all seeds.
      last_by_seed: the same for each seed.
      kl: mean KL over the last 5 iterations, in nats per answer.
      curves: of each seed.
    """

    first: float
    last: float
    last_by_seed: tuple[float, ...]
    kl: float
    curves: Sequence[Curve]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningReport:
    """What was learnt; parts that were not measured are empty.

    Attributes:
      policy: rewards by method.
      ratings: reward models on planted ratings.
      reward: a reward model on preferences, in folds.
      dpo: margins of held-out pairs, by the name of the pairs.
    """

    policy: Mapping[str, PolicyResult] = dataclasses.field(default_factory=dict)
    ratings: Sequence[RatingResult] = ()
    reward: RewardResult | None = None
    dpo: Mapping[str, DirectResult] = dataclasses.field(default_factory=dict)


def measure_learning(
    *,
    only: Part | None,
    data: str | None,
    folder: pathlib.Path,
    seeds: int,
    iterations: int,
) -> LearningReport:
    """Measure all parts, or one, with the bundled model.

    Args:
      only: the part; None measures all.
      data: file of preferences.
      folder: for the points and the picture of "policy".
      seeds: runs of each method of "policy".
      iterations: of those runs.

    Raises:
      ConfigError: there is no data for "reward".
    """
    parts = PARTS if only is None else (only,)
    if "reward" in parts and data is None:
        raise ConfigError(
            "--data: the part reward needs a file of preferences, such as HH-RLHF's; "
            "give one, or choose another part with --only"
        )
    opened, report = open_model(), LearningReport()
    if "policy" in parts:
        curves = measure_curves(opened, seeds=seeds, iterations=iterations)
        folder.mkdir(parents=True, exist_ok=True)
        write_points(folder / "reward-kl.csv", curves)
        draw_points(folder / "reward-kl.png", curves)
        policy = {method: _policy_result(method, curves) for method in METHODS}
        report = dataclasses.replace(report, policy=policy)
    if "ratings" in parts:
        report = dataclasses.replace(report, ratings=measure_ratings(opened))
    pairs = [] if data is None else read_pairs(data, opened, length=_LENGTH)
    if "reward" in parts:
        reward = measure_reward_model(opened, pairs, length=_LENGTH)
        report = dataclasses.replace(report, reward=reward)
    if "dpo" in parts:
        planted = planted_pairs(
            opened, count=_PLANTED_PAIRS, length=_PLANTED_LENGTH, seed=0
        )
        dpo = {"planted": measure_dpo(opened, planted, length=_PLANTED_LENGTH)}
        if pairs:
            dpo["data"] = measure_dpo(opened, pairs, length=_LENGTH)
        report = dataclasses.replace(report, dpo=dpo)
    return report


def _policy_result(method: str, curves: Sequence[Curve]) -> PolicyResult:
    own = [curve for curve in curves if curve.method == method]
    last = [
        float(np.mean([point.reward for point in curve.points[-_LAST:]]))
        for curve in own
    ]
    return PolicyResult(
        first=float(np.mean([curve.points[0].reward for curve in own])),
        last=float(np.mean(last)),
        last_by_seed=tuple(last),
        kl=float(np.mean([p.kl for curve in own for p in curve.points[-_LAST:]])),
        curves=own,
    )
