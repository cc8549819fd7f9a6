"""`Stream`: a corpus as an endless, ordered stream of batches' rows that can go on.

Everything is a function of the seed and of how far the stream has come: the order of an
epoch is a keyed permutation, an example a function of its record, a row of the examples
in front of it. So the state is two numbers and the examples that wait to be packed,
named by their places, and it is the same wherever the stream runs.
"""

import collections
import concurrent.futures as futures
import copy
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from llama_jax.data.batch import Example, pack
from llama_jax.data.encode import Encoded, Encoder
from llama_jax.data.files import Corpus
from llama_jax.data.order import shuffled
from llama_jax.data.records import OnBad, parse
from llama_jax.errors import DataError

Packing = Literal["pack", "pad", "split"]
_BLOCK = 32  # records that a thread encodes at a time
_MOST_NAMED = 100


@dataclasses.dataclass
class Statistics:
    """What a stream has read and made of it.

    Attributes:
      records: read, over all epochs.
      truncated: of those, how many were cut off.
      examples, rows: put into batches.
      slots: of these rows.
      tokens: in these slots.
      targets: of these tokens, how many are followed by something learnt.
      dropped: records of the first epoch that gave nothing, by reason.
      problems: the first of those by file and line.
    """

    records: int = 0
    truncated: int = 0
    examples: int = 0
    rows: int = 0
    slots: int = 0
    tokens: int = 0
    targets: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def fill_rate(self) -> float:
        """Which part of the slots has a token."""
        return self.tokens / self.slots if self.slots else 0.0

    @property
    def left_out(self) -> str:
        """In words, how many records gave nothing in an epoch, and were cut in all."""
        parts = [f"{count:,} {reason}" for reason, count in self.dropped.items()]
        cut = f"; truncated: {self.truncated:,}" if self.truncated else ""
        return f"dropped: {', '.join(parts) or 'none'}{cut}"


@dataclasses.dataclass(kw_only=True)
class Stream:
    """The rows of the global batches, one list of examples for each row.

    Attributes:
      corpus: the records.
      encoder: what makes examples of them.
      batch_size: B of the global batch.
      packing: several examples to a row (`"pack"`), also cutting those that do not fit
        (`"split"`, of text only), or one (`"pad"`).
      look_ahead: of packing.
      shuffle: whether each epoch has another order, or that of the files.
      seed: of the orders.
      epochs: after so many the stream ends, with empty rows in the last batch; None
        for never.
      on_bad: whether a record that gives nothing is dropped or raises its `DataError`.
      workers: threads that encode ahead; 0 to encode when asked.
      statistics: of what was yielded.
    """

    corpus: Corpus
    encoder: Encoder
    batch_size: int
    packing: Packing = "pack"
    look_ahead: int = 64
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = None
    on_bad: OnBad = "refuse"
    workers: int = 0
    statistics: Statistics = dataclasses.field(default_factory=Statistics)

    def __post_init__(self) -> None:
        """Begin at the beginning."""
        if self.packing == "split" and self.encoder.format != "text":
            raise DataError(
                f"data: {self.encoder.format} cannot be split between rows, only text; "
                "use packing 'pack'"
            )
        self._epoch, self._record, self._window = 0, 0, 0
        self._waiting: list[Example] = []
        self._found = False
        self._settings = self.settings()

    @property
    def progress(self) -> float:
        """Epochs that were read, with their fraction."""
        return self._epoch + self._record / len(self.corpus)

    def settings(self) -> dict[str, Any]:
        """What the batches depend on, beside the state."""
        encoder = self.encoder
        return {
            "data": self.corpus.fingerprint,
            "tokenizer": hashlib.sha256(encoder.tokenizer.contents).hexdigest()[:16],
            "format": encoder.format,
            "sequence length": encoder.length,
            "on_long": encoder.on_long,
            "infilling rate": encoder.infilling_rate,
            "batch size": self.batch_size,
            "packing": self.packing,
            "look-ahead": self.look_ahead,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the last batch, for JSON."""
        return {
            "settings": self._settings,
            "epoch": self._epoch,
            "record": self._record,
            "window": self._window,
            "waiting": [list(example.origin) for example in self._waiting],
            "statistics": dataclasses.asdict(self.statistics),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of a stream of the same settings.

        Raises:
          DataError: it is another stream's state, or none.
        """
        try:
            before, now = dict(state["settings"]), self._settings
            for name in now:
                if before.get(name) != now[name]:
                    raise DataError(
                        f"data: the {name} was {before.get(name)!r} when the state was "
                        f"saved and is {now[name]!r} now; resume with what it was, or "
                        "begin anew"
                    )
            waiting = [tuple(map(int, origin)) for origin in state["waiting"]]
            epoch, record, window = (
                int(state[name]) for name in ("epoch", "record", "window")
            )
            statistics = Statistics(**copy.deepcopy(state["statistics"]))
            examples: dict[int, list[Example]] = {}
            for number in sorted({origin[0] for origin in waiting}):
                (encoded,) = self._encode(epoch, number, number + 1)
                examples[number] = encoded.examples  # type: ignore[union-attr]
            found = [
                examples[number][part].cut(start)[1] for number, part, start in waiting
            ]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"data: the saved state is damaged ({error!r}); begin anew"
            ) from error
        self._epoch, self._record, self._window = epoch, record, window
        self._waiting, self.statistics = found, statistics

    def batches(self) -> Iterator[list[list[Example]]]:
        """The rows of each batch; between two of them `state` may be asked for."""
        rows = self._rows()
        while batch := list(itertools.islice(rows, self.batch_size)):
            batch += [[] for _ in range(self.batch_size - len(batch))]
            self._count(batch)
            yield batch

    def _rows(self) -> Iterator[list[Example]]:
        """Rows of one epoch after another; none has examples of two."""
        while self.epochs is None or self._epoch < self.epochs:
            examples = self._examples()
            if self.packing == "pad":
                yield from ([example] for example in examples)
            else:
                yield from pack(
                    examples,
                    self.encoder.length,
                    look_ahead=self.look_ahead,
                    split=self.packing == "split",
                    waiting=self._waiting,
                )
            if not self.statistics.examples and not self._found:
                raise self._nothing()
            self._epoch, self._record, self._window = self._epoch + 1, 0, 0

    def _examples(self) -> Iterator[Example]:
        """What is left of the epoch; the state is moved as each is handed over."""
        counts = self.statistics
        self._found = bool(self._waiting)
        for record, encoded in self._ahead(self._epoch, self._record):
            done = self._window if record == self._record else 0
            if not done:
                counts.records += 1
            if isinstance(encoded, DataError):
                self._drop(encoded)
            else:
                counts.truncated += encoded.truncated and not done
                for window, example in enumerate(encoded.examples):
                    if window >= done:
                        self._found = True
                        self._record, self._window = record, window + 1
                        yield example
            self._record, self._window = record + 1, 0

    def _drop(self, error: DataError) -> None:
        if self.on_bad == "refuse" and error.reason != "long":
            raise error
        if self.encoder.on_long == "refuse" and error.reason == "long":
            raise error
        if self._epoch:  # it was named in the first
            return
        counts = self.statistics
        counts.dropped[error.reason] = counts.dropped.get(error.reason, 0) + 1
        if len(counts.problems) < _MOST_NAMED:
            counts.problems.append(str(error))

    def _nothing(self) -> DataError:
        why = ", ".join(f"{n} {name}" for name, n in self.statistics.dropped.items())
        first = self.statistics.problems[:1]
        return DataError(
            f"data: none of the {len(self.corpus)} records can be learnt from ({why}); "
            f"the first is {first[0] if first else 'empty'}"
        )

    def _count(self, batch: list[list[Example]]) -> None:
        counts = self.statistics
        filled = [example for row in batch for example in row]
        counts.examples += len(filled)
        counts.rows += sum(map(bool, batch))
        counts.slots += sum(map(bool, batch)) * self.encoder.length
        counts.tokens += sum(example.size for example in filled)
        counts.targets += sum(int(example.mask[1:].sum()) for example in filled)

    def _ahead(
        self, epoch: int, first: int
    ) -> Iterator[tuple[int, Encoded | DataError]]:
        """Records of an epoch from its place `first` on, encoded ahead in threads."""
        starts = range(first, len(self.corpus), _BLOCK)
        if not self.workers:
            for start in starts:
                yield from enumerate(self._block(epoch, start), start)
            return
        pool = futures.ThreadPoolExecutor(self.workers, "llama_jax-encode")
        try:
            coming = iter(starts)
            running: collections.deque[tuple[int, futures.Future]] = collections.deque()
            while True:
                for start in itertools.islice(coming, 3 * self.workers - len(running)):
                    running.append((start, pool.submit(self._block, epoch, start)))
                if not running:
                    return
                start, future = running.popleft()
                yield from enumerate(future.result(), start)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _block(self, epoch: int, start: int) -> list[Encoded | DataError]:
        return self._encode(epoch, start, min(start + _BLOCK, len(self.corpus)))

    def _encode(self, epoch: int, first: int, last: int) -> list[Encoded | DataError]:
        """What becomes of the records at these places of an epoch's order."""
        numbers = list(range(first, last))
        if self.shuffle:
            key = (self.seed, epoch)
            numbers = shuffled(first, last, len(self.corpus), key=key).tolist()
        prefer_text = self.encoder.format in ("text", "infilling")
        found: list[Encoded | DataError] = []
        for place, number in enumerate(numbers, start=first):
            try:
                record = parse(self.corpus.read(number), prefer_text=prefer_text)
                examples, truncated = self.encoder.encode(record, epoch, number)
                named = [
                    example._replace(origin=(place, window, 0))
                    for window, example in enumerate(examples)
                ]
                found.append(Encoded(named, truncated))
            except DataError as error:
                found.append(error)
        return found
