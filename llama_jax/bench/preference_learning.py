"""Learning from preferences: a reward model in k folds, planted ratings, and DPO."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.bench.bag_of_words import fit_and_score
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.files import Corpus, Location
from llama_jax.loading import Opened
from llama_jax.model.transformer import Llama
from llama_jax.rlhf.direct_preference import answer_logprobs, prefer_directly
from llama_jax.rlhf.pairs import (
    UNKNOWN,
    EncodedDialog,
    PairBatch,
    PairSource,
    encode_dialog,
)
from llama_jax.rlhf.preferences import RATINGS, Margins, Preference, margin
from llama_jax.rlhf.reward_model import (
    PairScores,
    agreement,
    reward_loss,
    score_rows,
)
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.text.dialogs import Message
from llama_jax.text.prompt_formats import get_format
from llama_jax.train.methods import Method, train_weights
from llama_jax.train.run_config import RunConfig
from llama_jax.train.state import TrainState, init_state
from llama_jax.types import Array, Params, Path

FORMAT = "vicuna"
_BATCH = 16
_RUNTIME = Runtime(param_dtype="float32", rules=TRAINING_RULES)
_WORDS = (
    ("sun", "happy", "kind", "friend", "play", "smile", "flower", "love"),
    ("dark", "sad", "mean", "lost", "cry", "storm", "mud", "hurt"),
)
_ANSWER_WORDS = 8
_SWAPPED = 0.25


class Pair(NamedTuple):
    """A preference, with the last tokens of its dialogs.

    Attributes:
      preference: as the file has it.
      dialogs: the chosen and the rejected one, cut on the left.
      lengths: tokens of the whole dialogs.
    """

    preference: Preference
    dialogs: tuple[EncodedDialog, EncodedDialog]
    lengths: tuple[int, int]

    @property
    def answers(self) -> tuple[str, str]:
        """The texts of both answers."""
        chosen, rejected = self.preference.chosen, self.preference.rejected
        return chosen[-1]["content"], rejected[-1]["content"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardResult:
    """A reward model on pairs that it was not trained on, next to simple rules.

    Attributes:
      pairs: number of pairs.
      accuracy: of the reward model.
      shorter: accuracy of "the shorter dialog wins".
      bag_of_words: accuracy of a logistic regression on the words of the answers.
      training_accuracy: of the reward model on the pairs of the last epoch.
      length_correlation: of score and length, mean over folds.
      by_quartile: accuracy of the reward model within quartiles of the bag of words'
        signed margin; in the first it is mostly wrong.
      bag_by_quartile: accuracy of the bag of words there.
    """

    pairs: int
    accuracy: float
    shorter: float
    bag_of_words: float
    training_accuracy: float
    length_correlation: float
    by_quartile: tuple[float, ...]
    bag_by_quartile: tuple[float, ...]

    @property
    def error(self) -> float:
        """The standard error of the accuracy."""
        return float((self.accuracy * (1 - self.accuracy) / self.pairs) ** 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatingResult:
    """A reward model on pairs with planted ratings.

    Attributes:
      margins: of its loss.
      accuracy: by rating, from the least to the most.
      difference: mean difference of the scores, by rating.
    """

    margins: Margins
    accuracy: tuple[float, ...]
    difference: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectResult:
    """DPO on held-out pairs; before training all implicit rewards are 0.

    Attributes:
      pairs: number of held-out pairs.
      margin: mean difference of the implicit rewards.
      error: its standard error.
      accuracy: share of pairs with the higher implicit reward for the chosen answer.
      chosen_reward: mean implicit reward of the chosen answers.
    """

    pairs: int
    margin: float
    error: float
    accuracy: float
    chosen_reward: float


def read_pairs(path: Path, opened: Opened, *, length: int) -> list[Pair]:
    """Read preferences; of each dialog the last tokens remain.

    Args:
      path: file of preferences; records that are no pair are dropped.
      opened: model whose tokenizer encodes them.
      length: tokens of a dialog that remain.
    """
    source = PairSource(
        corpus=Corpus([path]),
        tokenizer=opened.tokenizer,
        format=get_format(FORMAT),
        batch_size=1,
        length=1 << 20,
        epochs=1,
        shuffle=False,
        on_bad="drop",
    )
    return [_cut(*pair, length) for pair in source.pairs()]


def planted_pairs(
    opened: Opened, *, count: int, length: int, seed: int, swapped: float = 0.0
) -> list[Pair]:
    """Make pairs whose rating is planted: how many more cheerful words an answer has.

    An answer has 8 words. The chosen one has 1, 2, 3 or 4 more of the cheerful words
    than the rejected one, for ratings 0 to 3.

    Args:
      opened: model whose tokenizer encodes them.
      count: number of pairs.
      length: tokens of a dialog that remain.
      seed: of the words.
      swapped: share of pairs whose answers are swapped, as if annotators erred.
    """
    draw, pairs = np.random.default_rng(seed), []
    for number in range(count):
        rating = int(draw.integers(len(RATINGS)))
        low = int(draw.integers(_ANSWER_WORDS - rating))
        dialogs = []
        for cheerful in (low + rating + 1, low):
            sizes = (cheerful, _ANSWER_WORDS - cheerful)
            words = [
                word
                for group, size in zip(_WORDS, sizes, strict=True)
                for word in draw.choice(group, size)
            ]
            draw.shuffle(words)
            answer = Message(role="assistant", content=" ".join(words))
            dialogs.append([Message(role="user", content="Say some words."), answer])
        where = Location("planted", "item", number + 1)
        if draw.random() < swapped:
            dialogs.reverse()
        preference = Preference(where, dialogs[0], dialogs[1], rating)
        chosen, rejected = (
            encode_dialog(dialog, opened.tokenizer, get_format(FORMAT), 1 << 20)
            for dialog in dialogs
        )
        pairs.append(_cut(preference, chosen, rejected, length))
    return pairs


def measure_reward_model(
    opened: Opened,
    pairs: Sequence[Pair],
    *,
    length: int,
    folds: int = 5,
    epochs: int = 1,
    learning_rate: float = 1e-4,
) -> RewardResult:
    """Train a reward model on all folds but one, score that one; for each fold."""
    trainer = _reward_trainer(opened, learning_rate)
    fold = np.arange(len(pairs)) % folds
    scores, bag = np.zeros((len(pairs), 2)), np.zeros(len(pairs))
    lengths = np.array([pair.lengths for pair in pairs])
    correlations, last_epoch = [], []
    for number in range(folds):
        training = [pairs[i] for i in np.flatnonzero(fold != number)]
        test = np.flatnonzero(fold == number)
        params, accuracies = trainer(training, length, epochs, "none")
        held_out = [pairs[i] for i in test]
        scores[test] = _scores(opened, params, held_out)
        last_epoch.append(accuracies)
        bag[test] = fit_and_score(
            [pair.answers for pair in training], [pair.answers for pair in held_out]
        )
        part = PairScores(scores[test], lengths[test], np.full(len(test), -1))
        correlations.append(agreement(part).length_correlation)
    whole = agreement(PairScores(scores, lengths, np.full(len(pairs), -1)))
    agrees = 0.5 * (1 + np.sign(scores[:, 0] - scores[:, 1]))
    bag_agrees = 0.5 * (1 + np.sign(bag))
    quartiles = np.array_split(np.argsort(bag, kind="stable"), 4)
    return RewardResult(
        pairs=whole.pairs,
        accuracy=whole.accuracy,
        shorter=whole.shorter,
        bag_of_words=float(bag_agrees.mean()),
        training_accuracy=float(np.mean(last_epoch)),
        length_correlation=float(np.mean(correlations)),
        by_quartile=tuple(float(agrees[rows].mean()) for rows in quartiles),
        bag_by_quartile=tuple(float(bag_agrees[rows].mean()) for rows in quartiles),
    )


def measure_ratings(
    opened: Opened, *, count: int = 960, length: int = 32, learning_rate: float = 3e-4
) -> list[RatingResult]:
    """Train reward models on planted ratings for one epoch, without and with margins.

    A quarter of the training pairs is swapped, whatever their rating, so that the best
    difference of scores is finite: log 3 without a margin, more with one. A quarter as
    many other pairs are scored, of which none is swapped.
    """
    training = planted_pairs(
        opened, count=count, length=length, seed=0, swapped=_SWAPPED
    )
    held_out = planted_pairs(opened, count=count // 4, length=length, seed=1)
    rating = np.array([pair.preference.rating for pair in held_out])
    trainer, results = _reward_trainer(opened, learning_rate), []
    choices: tuple[Margins, ...] = ("none", "small", "large")
    for margins in choices:
        params, _ = trainer(training, length, 1, margins)
        scores = _scores(opened, params, held_out)
        difference = scores[:, 0] - scores[:, 1]
        by_rating = [difference[rating == number] for number in range(len(RATINGS))]
        results.append(
            RatingResult(
                margins=margins,
                accuracy=tuple(float((d > 0).mean()) for d in by_rating),
                difference=tuple(float(d.mean()) for d in by_rating),
            )
        )
    return results


def measure_dpo(
    opened: Opened,
    pairs: Sequence[Pair],
    *,
    length: int,
    beta: float = 0.1,
    learning_rate: float = 1e-4,
) -> DirectResult:
    """Train on three of four pairs with DPO for one epoch, and score the others."""
    base = train_weights(opened.config, _RUNTIME, opened=opened)
    method = prefer_directly(base, beta=beta)
    held_out = [pair for number, pair in enumerate(pairs) if number % 4 == 3]
    training = [pair for number, pair in enumerate(pairs) if number % 4 != 3]
    train = _Trainer(method, learning_rate)
    policy, _ = train(training, length, 1, "none")

    assert isinstance(base.model, Llama)
    logprobs = jax.jit(functools.partial(answer_logprobs, base.model))
    rewards = np.concatenate(
        [
            beta * np.asarray(logprobs(policy, batch) - logprobs(method.frozen, batch))
            for batch in _batches(held_out, length, "none", np.arange(len(held_out)))
        ]
    )[: len(held_out)]
    difference = rewards[:, 0] - rewards[:, 1]
    return DirectResult(
        pairs=len(held_out),
        margin=float(difference.mean()),
        error=float(difference.std() / np.sqrt(len(held_out))),
        accuracy=float(np.mean(0.5 * (1 + np.sign(difference)))),
        chosen_reward=float(rewards[:, 0].mean()),
    )


class _Trainer:
    """Trains from the method's initial leaves; compiles once for equal lengths."""

    def __init__(self, method: Method, learning_rate: float) -> None:
        self.method = method
        # A constant rate, so that one program serves runs of any length.
        self.config = RunConfig(
            steps=1, learning_rate=learning_rate, schedule="constant", weight_decay=0.0
        )
        self.optimizer = self.config.make_optimizer(1)
        self.step = method.make_step(self.optimizer, 1)

    def __call__(
        self, pairs: Sequence[Pair], length: int, epochs: int, margins: Margins
    ) -> tuple[Params, float]:
        """The trained leaves, and the accuracy on the batches of the last epoch."""
        state: TrainState = init_state(self.method.init(), self.optimizer)
        draw = np.random.default_rng(0)
        accuracies: list[Array] = []
        for _ in range(epochs):
            order, accuracies = draw.permutation(len(pairs)), []
            for batch in _batches(pairs, length, margins, order):
                state, metrics = self.step(state, self.method.frozen, batch)
                accuracies.append(metrics.metrics["accuracy"])
        return state.params, float(np.mean([float(a) for a in accuracies]))


def _reward_trainer(
    opened: Opened, learning_rate: float
) -> Callable[[Sequence[Pair], int, int, Margins], tuple[Params, float]]:
    scalar = opened.config.replace(head="scalar")
    method = train_weights(scalar, _RUNTIME, opened=opened, loss=reward_loss())
    return _Trainer(method, learning_rate)


def _scores(opened: Opened, params: Params, pairs: Sequence[Pair]) -> np.ndarray:
    scalar = opened.config.replace(head="scalar")
    model = train_weights(scalar, _RUNTIME).model
    rows = [dialog.ids for pair in pairs for dialog in pair.dialogs]
    loaded = Loaded(model, dict(params), opened.tokenizer)
    return score_rows(loaded, rows, batch_size=2 * _BATCH).reshape(-1, 2)


def _cut(
    preference: Preference, chosen: EncodedDialog, rejected: EncodedDialog, length: int
) -> Pair:
    def last(dialog: EncodedDialog) -> EncodedDialog:
        dropped = max(len(dialog.ids) - length, 0)
        return EncodedDialog(
            dialog.ids[dropped:], max(dialog.prompt_length - dropped, 0)
        )

    lengths = (len(chosen.ids), len(rejected.ids))
    return Pair(preference, (last(chosen), last(rejected)), lengths)


def _batches(
    pairs: Sequence[Pair], length: int, margins: Margins, order: np.ndarray
) -> Iterator[PairBatch]:
    for first in range(0, len(order), _BATCH):
        tokens = np.zeros((_BATCH, 2, length), np.int32)
        answer = np.zeros(tokens.shape, bool)
        last = np.zeros((_BATCH, 2), np.int32)
        margins_of, weight = np.zeros((2, _BATCH), np.float32)
        unknown = np.full((_BATCH, 2), UNKNOWN, np.int32)
        for row, number in enumerate(order[first : first + _BATCH]):
            preference, dialogs, _ = pairs[number]
            for side, (ids, start) in enumerate(dialogs):
                tokens[row, side, : len(ids)] = ids
                answer[row, side, start : len(ids)] = True
                last[row, side] = len(ids) - 1
            margins_of[row] = margin(preference.rating, margins)
            weight[row] = 1
        arrays = (tokens, answer, last, margins_of, unknown[:, 0], unknown, weight)
        yield PairBatch(*map(jnp.asarray, arrays))
