"""A bag of words as a classifier of preferences: what words alone explain."""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llama_jax.types import Float

_WORD = re.compile(r"[a-z']+|[?!.]")
_ITERATIONS = 300


def word_counts(texts: Sequence[str], vocabulary: Sequence[str]) -> np.ndarray:
    """Count the words of texts: log(1 + count), `[N, V]`."""
    index = {word: number for number, word in enumerate(vocabulary)}
    counts = np.zeros((len(texts), len(vocabulary)))
    for row, text in enumerate(texts):
        for word, count in Counter(_WORD.findall(text.lower())).items():
            if word in index:
                counts[row, index[word]] = np.log1p(count)
    return counts


def fit_and_score(
    training: Sequence[tuple[str, str]],
    held_out: Sequence[tuple[str, str]],
    *,
    least: int = 5,
    decay: float = 1e-2,
) -> Float[np.ndarray, " N"]:
    """Fit a logistic regression to preferences, and score held-out ones.

    It minimizes mean(log(1 + exp(-w·x))) + decay/2 |w|² by gradient descent with
    momentum, where x is the difference of the word counts of chosen and rejected text.

    Args:
      training: chosen and rejected texts.
      held_out: the same, of other pairs.
      least: number of training texts that a word must be in.
      decay: of the weights.

    Returns:
      The margin w·x of each held-out pair; the classifier is right where it is > 0.

    >>> pairs = [("yes please", "no please"), ("oh yes", "oh no")]
    >>> bool((fit_and_score(pairs, pairs, least=1) > 0).all())
    True
    """
    texts = [text for pair in training for text in pair]
    present = Counter(w for text in texts for w in set(_WORD.findall(text.lower())))
    vocabulary = sorted(word for word, count in present.items() if count >= least)

    def features(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        chosen, rejected = (
            word_counts([pair[side] for pair in pairs], vocabulary) for side in (0, 1)
        )
        return chosen - rejected

    x = features(training)
    weights = velocity = np.zeros(len(vocabulary))
    # The loss's curvature is at most mean|x|² / 4 + decay.
    rate = 1.0 / (np.mean(np.sum(x**2, axis=1)) / 4 + decay)
    for _ in range(_ITERATIONS):
        slope = -1.0 / (1.0 + np.exp(np.clip(x @ weights, -50, 50)))
        gradient = x.T @ slope / len(x) + decay * weights
        velocity = 0.9 * velocity - rate * gradient
        weights = weights + velocity
    margins: np.ndarray = features(held_out) @ weights
    return margins
