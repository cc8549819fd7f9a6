"""Reward models: their loss, and how well they agree with preferences."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.files import Location
from llama_jax.distributed import to_host
from llama_jax.errors import ConfigError
from llama_jax.generation.batching import bucket
from llama_jax.model.transformer import Llama, ScalarModel, apply
from llama_jax.rlhf.losses import ranking_losses, safety_losses
from llama_jax.rlhf.pairs import UNKNOWN, PairBatch, PairSource
from llama_jax.rlhf.preferences import RATINGS
from llama_jax.train.losses import LossSums, ModelLoss
from llama_jax.types import Array, Float, Int, Params, Tokens


def pair_scores(
    model: ScalarModel, params: Params, batch: PairBatch
) -> Float[Array, "B 2"]:
    """Compute the score of each dialog: the scalar of its last token."""
    rows = batch.tokens.reshape(-1, batch.tokens.shape[-1])
    return last_scalars(model, params, rows, batch.last.reshape(-1)).reshape(-1, 2)


def last_scalars(
    model: ScalarModel, params: Params, tokens: Tokens, last: Int[Array, " B"]
) -> Float[Array, " B"]:
    """Compute the scalar of one token of each row, the last of a dialog."""
    scalars, _ = apply(model, params, tokens)
    scalars = scalars.astype(jnp.float32)
    return jnp.take_along_axis(scalars, last[:, None], axis=1)[:, 0]


def reward_loss(*, safety_weight: float = 0.0) -> ModelLoss:
    """Make the loss of a reward model (arXiv:2307.09288, section 3.2.2).

        L = -log σ(r_chosen - r_rejected - m) + λ (mean safety loss of both answers)

    Args:
      safety_weight: λ of `losses.safety_losses`, which counts answers with a label.

    Returns:
      A loss of a `ScalarModel` and a `PairBatch`. Its metrics are `accuracy` (share of
      pairs with the higher score for the chosen answer; equal scores count half) and
      `margin` (mean difference of the scores).

    Raises:
      ConfigError: the weight is negative or not finite.
    """
    if not 0 <= safety_weight < np.inf:
        raise ConfigError(
            f"safety_weight: must be 0 or a positive number, got {safety_weight!r}"
        )

    def loss(model: Llama | ScalarModel, params: Params, batch: PairBatch) -> LossSums:
        assert isinstance(model, ScalarModel)
        scores = pair_scores(model, params, batch)
        losses = ranking_losses(scores[:, 0], scores[:, 1], batch.margin)
        if safety_weight:
            labelled = batch.safe != UNKNOWN
            of_both = safety_losses(scores.reshape(-1), batch.safe.reshape(-1) == 1)
            of_both = jnp.where(labelled, of_both.reshape(scores.shape), 0.0)
            losses = losses + safety_weight * jnp.mean(of_both, axis=1)
        difference = scores[:, 0] - scores[:, 1]
        agrees = 0.5 * (1 + jnp.sign(difference))
        return LossSums(
            jnp.sum(losses * batch.weight),
            jnp.sum(batch.weight),
            {
                "accuracy": jnp.sum(agrees * batch.weight),
                "margin": jnp.sum(difference * batch.weight),
            },
        )

    return loss


def score_rows(
    loaded: Loaded, rows: Sequence[Sequence[int]], *, batch_size: int = 8
) -> Float[np.ndarray, " N"]:
    """Compute the scores of token ids with a reward model: the scalar of the last one.

    Args:
      loaded: a model with a scalar head.
      rows: ids of dialogs, each no longer than the context.
      batch_size: rows of every batch.

    Raises:
      ConfigError: the model has no scalar head.
    """
    loaded.model.config.check_head("scalar", "scoring")
    assert isinstance(loaded.model, ScalarModel)
    limit = loaded.model.config.max_seq_len
    by_width: dict[int, list[int]] = {}
    for index, ids in enumerate(rows):
        by_width.setdefault(bucket(len(ids), limit), []).append(index)
    scores = np.zeros(len(rows), np.float32)
    for width, indices in sorted(by_width.items()):
        for first in range(0, len(indices), batch_size):
            group = indices[first : first + batch_size]
            tokens = np.zeros((batch_size, width), np.int32)
            last = np.zeros(batch_size, np.int32)
            for row, index in enumerate(group):
                tokens[row, : len(rows[index])] = rows[index]
                last[row] = len(rows[index]) - 1
            on_device = jnp.asarray(tokens), jnp.asarray(last)
            result = to_host(_jitted_scores(loaded.model, loaded.params, *on_device))
            scores[group] = result[: len(group)]
    return scores


class PairScores(NamedTuple):
    """Scores of pairs, as NumPy arrays.

    Attributes:
      scores: of the chosen and the rejected dialog, `[N, 2]`.
      lengths: their numbers of tokens, `[N, 2]`.
      rating: index in `RATINGS`, or -1, `[N]`.
      locations: of the records, `[N]`.
    """

    scores: np.ndarray
    lengths: np.ndarray
    rating: np.ndarray
    locations: Sequence[Location] = ()


def score_pairs(
    loaded: Loaded, source: PairSource, *, batch_size: int = 8
) -> PairScores:
    """Score all pairs of a source with a reward model.

    Args:
      loaded: a model with a scalar head.
      source: pairs of one epoch.
      batch_size: dialogs of every batch.

    Raises:
      ConfigError: the model has no scalar head.
      DataError: there is no pair.
    """
    pairs = list(source.pairs())
    rows = [dialog.ids for _, *both in pairs for dialog in both]
    scores = score_rows(loaded, rows, batch_size=batch_size)
    unknown = [UNKNOWN if p.rating is None else p.rating for p, *_ in pairs]
    return PairScores(
        scores.reshape(-1, 2),
        np.asarray([len(ids) for ids in rows], np.int32).reshape(-1, 2),
        np.asarray(unknown, np.int32),
        [preference.location for preference, *_ in pairs],
    )


@functools.partial(jax.jit, static_argnames="model")
def _jitted_scores(
    model: ScalarModel, params: Params, tokens: Tokens, last: Int[Array, " B"]
) -> Float[Array, " B"]:
    return last_scalars(model, params, tokens, last)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well scores agree with preferences.

    Attributes:
      pairs: number of pairs.
      accuracy: share of pairs whose chosen dialog has the higher score.
      by_rating: number of pairs and accuracy for each rating that occurs.
      shorter: accuracy of preferring the shorter dialog, which needs no model.
      length_correlation: correlation of score and length over all dialogs.
    """

    pairs: int
    accuracy: float
    by_rating: dict[str, tuple[int, float]]
    shorter: float
    length_correlation: float


def agreement(pairs: PairScores) -> Agreement:
    """Compute how well scores agree with preferences; equal scores count half.

    >>> scores, lengths = np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([[5, 9], [4, 4]])
    >>> agreement(PairScores(scores, lengths, np.array([3, 0]))).by_rating
    {'negligibly better': (1, 0.0), 'significantly better': (1, 1.0)}
    """
    agrees = _higher(pairs.scores)
    rated = {
        name: pairs.rating == number
        for number, name in enumerate(RATINGS)
        if (pairs.rating == number).any()
    }
    return Agreement(
        pairs=len(agrees),
        accuracy=float(agrees.mean()),
        by_rating={
            name: (int(which.sum()), float(agrees[which].mean()))
            for name, which in rated.items()
        },
        shorter=float(_higher(-pairs.lengths).mean()),
        length_correlation=_correlation(pairs.scores, pairs.lengths),
    )


def _higher(values: np.ndarray) -> np.ndarray:
    """1 where the first of two values is higher, ½ where they are equal, else 0."""
    return 0.5 * (1 + np.sign(values[:, 0] - values[:, 1]))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.ravel().astype(float), y.ravel().astype(float)
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
