"""`PairSource`: batches of preferences, encoded in a prompt format."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.data.encode import OnLong
from llama_jax.data.files import Corpus
from llama_jax.data.order import shuffled
from llama_jax.data.records import OnBad
from llama_jax.errors import DataError, PromptError, TokenizerError
from llama_jax.rlhf.preferences import (
    Margins,
    Preference,
    check_margins,
    margin,
    parse_preference,
)
from llama_jax.text.dialogs import Message, PromptFormat
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Array, Bool, Float, Int, JsonObject, PyTree

UNKNOWN = -1  # rating or safety label


class PairBatch(NamedTuple):
    """Pairs of dialogs as tokens; the chosen one of each pair is the first.

    Attributes:
      tokens: ids, padded on the right.
      answer: tokens of the last answers, with the token that ends each.
      last: slot of the last token of each dialog.
      margin: of the ranking loss.
      rating: index in `RATINGS`, or -1.
      safe: 1 for a safe answer, 0 for an unsafe one, or -1.
      weight: 1, or 0 for a row that fills up the last batch.
    """

    tokens: Int[Array, "B 2 T"]
    answer: Bool[Array, "B 2 T"]
    last: Int[Array, "B 2"]
    margin: Float[Array, " B"]
    rating: Int[Array, " B"]
    safe: Int[Array, "B 2"]
    weight: Float[Array, " B"]


class EncodedDialog(NamedTuple):
    """A dialog as ids, and the number of those before its last answer."""

    ids: list[int]
    prompt_length: int


def encode_dialog(
    dialog: Sequence[Message], tokenizer: Tokenizer, format: PromptFormat, length: int
) -> EncodedDialog:
    """Encode a dialog that ends with an answer.

    Raises:
      DataError: it cannot be written in this format, or has more than `length` tokens.
    """
    try:
        spans = format.spans(tokenizer, list(dialog))
    except (PromptError, TokenizerError) as error:
        raise DataError(str(error), reason="unsuitable") from error
    ids = [id for span in spans for id in span.ids]
    if len(ids) > length:
        raise DataError(
            f"has a dialog of {len(ids)} tokens, more than {length}; raise the length",
            reason="long",
        )
    answer = 0
    for span in reversed(spans):
        if not span.is_answer:
            break
        answer += len(span.ids)
    return EncodedDialog(ids, len(ids) - answer)


@dataclasses.dataclass(kw_only=True)
class PairSource:
    """Batches of preferences, whose position can be saved; see `train.run.BatchSource`.

    Records are read and encoded on demand. Each epoch has every record once.

    Attributes:
      corpus: the records.
      tokenizer: of the model.
      format: prompt format of the dialogs.
      batch_size: B, pairs of a batch, over all processes.
      length: T; a longer dialog drops its pair, or is refused.
      margins: of the ranking loss.
      epochs: after which the source ends; None never ends.
      shuffle: shuffle each epoch, or keep the order of the files.
      seed: of the orders.
      on_bad: what to do with a record that is no pair of dialogs.
      on_long: "drop" or "refuse" pairs that do not fit.
      process_index, process_count: which equal share of the rows to yield.

    Raises:
      DataError: a setting is out of range; while iterating, a record is refused.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    format: PromptFormat
    batch_size: int
    length: int
    margins: Margins = "none"
    epochs: int | None = None
    shuffle: bool = True
    seed: int = 0
    on_bad: OnBad = "refuse"
    on_long: OnLong = "drop"
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        """Check the settings, and start at the first record."""
        check_margins(self.margins)
        if self.on_long == "truncate":
            raise DataError(
                "data: a dialog that is cut off has no end to score; choose 'drop' or "
                "'refuse' for long pairs"
            )
        if (
            min(self.batch_size, self.length) < 1
            or self.batch_size % self.process_count
        ):
            raise DataError(
                f"data: batch size {self.batch_size} and length {self.length} must be "
                f"positive, and {self.process_count} processes must divide the batch"
            )
        self._epoch, self._record = 0, 0
        self._dropped: dict[str, int] = {}
        self.problems: list[str] = []

    def __iter__(self) -> Iterator[PairBatch]:
        """Batches from the current position."""
        pairs = self.pairs()
        while group := list(itertools.islice(pairs, self.batch_size)):
            share = self.batch_size // self.process_count
            first = self.process_index * share
            yield self._batch(group[first : first + share], share)

    def pairs(self) -> Iterator[tuple[Preference, EncodedDialog, EncodedDialog]]:
        """Records from the current position, with their encoded dialogs."""
        while self.epochs is None or self._epoch < self.epochs:
            any_pair = self._record > 0
            while self._record < len(self.corpus):
                number = self._number(self._record)
                self._record += 1
                try:
                    pair = self._encode(parse_preference(self.corpus.read(number)))
                except DataError as error:
                    self._drop(error)
                    continue
                any_pair = True
                yield pair
            if not any_pair:
                first = self.problems[0] if self.problems else "there is no record"
                raise DataError(f"data: no pair can be learnt from; the first: {first}")
            self._epoch, self._record = self._epoch + 1, 0

    @property
    def dropped(self) -> Mapping[str, int]:
        """Records that were dropped in the first epoch, by reason."""
        return self._dropped

    def facts(self) -> dict[str, float]:
        """Numbers for the record of a step."""
        progress = self._epoch + self._record / len(self.corpus)
        return {"epoch": round(progress, 6)}

    def settings(self) -> dict[str, object]:
        """What the batches depend on, for JSON."""
        return {
            "data": self.corpus.fingerprint,
            "tokenizer": hashlib.sha256(self.tokenizer.contents).hexdigest()[:16],
            "format": self.format.name,
            **self.format.settings,
            "batch size": self.batch_size,
            "length": self.length,
            "margins": self.margins,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def state(self) -> dict[str, object]:
        """The position after the last batch, for JSON."""
        return {
            "settings": self.settings(),
            "epoch": self._epoch,
            "record": self._record,
            "dropped": dict(self._dropped),
        }

    def restore(self, state: JsonObject) -> None:
        """Go to the position of a state.

        Raises:
          DataError: the state is of other files or settings.
        """
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                raise DataError(
                    f"data: the {name} was {state['settings'].get(name)!r} when the "
                    f"state was saved and is {value!r} now; resume with what it was"
                )
        self._epoch, self._record = int(state["epoch"]), int(state["record"])
        self._dropped = dict(state["dropped"])

    def _number(self, position: int) -> int:
        if not self.shuffle:
            return position
        key = (self.seed, self._epoch)
        return int(shuffled(position, position + 1, len(self.corpus), key=key)[0])

    def _drop(self, error: DataError) -> None:
        policy = self.on_long if error.reason == "long" else self.on_bad
        if policy == "refuse":
            raise error
        if self._epoch == 0:
            self._dropped[error.reason] = self._dropped.get(error.reason, 0) + 1
            self.problems = [*self.problems, str(error)][:100]

    def _encode(
        self, preference: Preference
    ) -> tuple[Preference, EncodedDialog, EncodedDialog]:
        try:
            margin(preference.rating, self.margins)
            chosen, rejected = (
                encode_dialog(dialog, self.tokenizer, self.format, self.length)
                for dialog in (preference.chosen, preference.rejected)
            )
        except DataError as error:
            where = f"{preference.location}: {error}"
            raise DataError(where, reason=error.reason) from error
        return preference, chosen, rejected

    def _batch(
        self, group: list[tuple[Preference, EncodedDialog, EncodedDialog]], rows: int
    ) -> PairBatch:
        tokens = np.zeros((rows, 2, self.length), np.int32)
        answer = np.zeros(tokens.shape, bool)
        last = np.zeros((rows, 2), np.int32)
        margins, weight = np.zeros((2, rows), np.float32)
        rating = np.full(rows, UNKNOWN, np.int32)
        safe = np.full((rows, 2), UNKNOWN, np.int32)
        for row, (preference, *dialogs) in enumerate(group):
            for side, (ids, start) in enumerate(dialogs):
                tokens[row, side, : len(ids)] = ids
                answer[row, side, start : len(ids)] = True
                last[row, side] = len(ids) - 1
            margins[row] = margin(preference.rating, self.margins)
            weight[row] = 1
            if preference.rating is not None:
                rating[row] = preference.rating
            if preference.safe is not None:
                safe[row] = preference.safe
        arrays: list[PyTree] = [tokens, answer, last, margins, rating, safe, weight]
        return PairBatch(*arrays)
