"""Reward against K: how much the best of K answers gains."""

import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.types import Float, JsonObject, Path


class Curve(NamedTuple):
    """Expected rewards of K answers, means over prompts.

    Attributes:
      k: numbers of answers.
      max: expected reward of the best of K.
      median: expected median reward of K.
      cut: share of answers that the limit of tokens cut.
      tokens: mean number of tokens of an answer.
    """

    k: tuple[int, ...]
    max: tuple[float, ...]
    median: tuple[float, ...]
    cut: float
    tokens: float


def expected_order_statistic(
    rewards: Float[np.ndarray, "N M"], k: int, rank: int
) -> float:
    """Expect the rank-th smallest of k rewards drawn without replacement from M.

    With the rewards of a prompt in ascending order, r_1 … r_M, it is the sum over i of
    r_i · C(i−1, rank−1) · C(M−i, k−rank) / C(M, k): the mean over all choices of k.

    Args:
      rewards: of M answers to each of N prompts.
      k: answers that are drawn, 1 … M.
      rank: 1 is the smallest, k the largest.

    Returns:
      The mean over prompts.

    >>> expected_order_statistic(np.array([[1.0, 2.0, 4.0]]), 2, 2)  # (2 + 4 + 4) / 3
    3.33...
    """
    size = rewards.shape[1]
    weights = [
        math.comb(i - 1, rank - 1) * math.comb(size - i, k - rank) / math.comb(size, k)
        for i in range(1, size + 1)
    ]
    ordered = np.sort(rewards, axis=1)
    return float((ordered @ np.asarray(weights)).mean())


def reward_curves(lines: Iterable[JsonObject]) -> dict[float, Curve]:
    """Compute max and median reward against K for each temperature.

    Args:
      lines: of the file that `sample_and_score` wrote; earlier answers do not count.

    Returns:
      Curves at K = 1, 2, 4, … and all answers, by temperature.
    """
    answers: dict[float, list[list[JsonObject]]] = {}
    for line in lines:
        own: dict[float, list[JsonObject]] = {}
        for answer in line["answers"]:
            if answer["source"] is None:
                own.setdefault(answer["temperature"], []).append(answer)
        for temperature, group in own.items():
            answers.setdefault(temperature, []).append(group)
    return {temperature: _curve(groups) for temperature, groups in answers.items()}


def _curve(groups: Sequence[Sequence[JsonObject]]) -> Curve:
    rewards = np.asarray([[a["reward"] for a in group] for group in groups], np.float64)
    size = rewards.shape[1]
    ks = sorted({*(2**power for power in range(size.bit_length())), size})
    highest = [expected_order_statistic(rewards, k, k) for k in ks]
    medians = [
        (
            expected_order_statistic(rewards, k, (k + 1) // 2)
            + expected_order_statistic(rewards, k, k // 2 + 1)
        )
        / 2
        for k in ks
    ]
    flat = [answer for group in groups for answer in group]
    return Curve(
        tuple(ks),
        tuple(highest),
        tuple(medians),
        cut=float(np.mean([not answer["ended"] for answer in flat])),
        tokens=float(np.mean([len(answer["token_ids"]) for answer in flat])),
    )


def curve_table(curves: Mapping[float, Curve]) -> str:
    """Write curves as a table in Markdown."""
    rows = ["| temperature | K | max reward | median reward |", "|---|---|---|---|"]
    rows += [
        f"| {temperature:g} | {k} | {high:.4f} | {median:.4f} |"
        for temperature, curve in curves.items()
        for k, high, median in zip(curve.k, curve.max, curve.median, strict=True)
    ]
    return "\n".join(rows)


def draw_curves(path: Path, curves: Mapping[float, Curve]) -> bool:
    """Draw curves as a PNG; return false if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, (temperature, curve) in enumerate(curves.items()):
        color = f"C{number}"
        label = f"temperature {temperature:g}"
        axes.plot(curve.k, curve.max, "o-", color=color, label=f"{label}, max")
        axes.plot(curve.k, curve.median, "s--", color=color, label=f"{label}, median")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="K, answers to a prompt", ylabel="reward, mean over prompts")
    axes.legend()
    figure.savefig(pathlib.Path(path), dpi=150)
    return True
