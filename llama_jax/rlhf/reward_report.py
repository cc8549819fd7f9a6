"""How well a reward model agrees with preferences, as tables of a report."""

import numpy as np

from llama_jax.rlhf.reward_model import Agreement, PairScores
from llama_jax.train.report import Table

_BINS = 12
_BAR = 30


def agreement_facts(measured: Agreement) -> dict[str, str]:
    """Describe an agreement in a few numbers."""
    facts = {
        "pairs": f"{measured.pairs:,}",
        "accuracy": _with_error(measured.accuracy, measured.pairs),
        "accuracy of preferring the shorter answer": f"{measured.shorter:.1%}",
        "correlation of score and length": f"{measured.length_correlation:+.3f}",
    }
    for name, (count, accuracy) in measured.by_rating.items():
        facts[f"accuracy, {name}"] = f"{_with_error(accuracy, count)} of {count:,}"
    return facts


def _with_error(accuracy: float, count: int) -> str:
    error = (accuracy * (1 - accuracy) / count) ** 0.5
    return f"{accuracy:.1%} ± {error:.1%}"


def score_histogram(pairs: PairScores) -> Table:
    """Count the scores of chosen and rejected dialogs in bins of equal width."""
    edges = np.histogram_bin_edges(pairs.scores, _BINS)
    counts = [np.histogram(pairs.scores[:, side], edges)[0] for side in (0, 1)]
    highest = max(int(count.max()) for count in counts)

    def cell(count: int) -> str:
        return f"{count:,} {'█' * -(-count * _BAR // highest)}"

    rows = [
        (f"{low:.2f} … {high:.2f}", cell(int(chosen)), cell(int(rejected)))
        for low, high, chosen, rejected in zip(
            edges[:-1], edges[1:], *counts, strict=True
        )
    ]
    return [("score", "chosen", "rejected"), *rows]
