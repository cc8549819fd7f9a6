"""`RowStream`: a corpus as an endless, ordered stream of the rows of batches.

Everything is a function of the seed and of the position: the order of an epoch is a
keyed permutation, an example is a function of its record, a row of the examples before
it. So the state is two numbers and the places of the examples that wait to be packed,
and it is the same wherever the stream runs.
"""

import collections
import concurrent.futures as futures
import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

from llama_jax.data.batch import Example, pack
from llama_jax.data.encode import Encoded, RecordEncoder
from llama_jax.data.files import Corpus
from llama_jax.data.order import shuffled
from llama_jax.data.records import OnBad, parse
from llama_jax.errors import DataError
from llama_jax.types import JsonObject

Packing = Literal["pack", "pad", "split"]
_BLOCK = 32  # records that a thread encodes at a time
_MAX_PROBLEMS = 100


@dataclasses.dataclass
class Statistics:
    """Counts of what a stream has read and yielded.

    Attributes:
      records: records read, over all epochs.
      truncated: records that were cut off.
      examples, rows: examples and rows in batches.
      slots: slots of these rows.
      tokens: tokens in these slots.
      targets: tokens that are followed by a learnt one.
      dropped: dropped records of the first epoch, by reason.
      problems: the first of their errors, with file and line.
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
        """The fraction of slots with a token."""
        return self.tokens / self.slots if self.slots else 0.0

    @property
    def left_out(self) -> str:
        """Words for the records dropped in an epoch, and truncated in all of them."""
        parts = [f"{count:,} {reason}" for reason, count in self.dropped.items()]
        cut = f"; truncated: {self.truncated:,}" if self.truncated else ""
        return f"dropped: {', '.join(parts) or 'none'}{cut}"


@dataclasses.dataclass(kw_only=True)
class RowStream:
    """The rows of the global batches; a row is a list of examples.

    Attributes:
      corpus: the records.
      encoder: makes examples of records.
      batch_size: B of the global batch.
      packing: several examples per row ("pack"), also cutting those that do not fit
        ("split", of text only), or one per row ("pad").
      look_ahead: examples that packing chooses from.
      shuffle: shuffle each epoch, or keep the order of the files.
      seed: of the orders.
      epochs: epochs after which the stream ends, with empty rows in the last batch;
        None never ends.
      on_bad: whether a record without examples is dropped or raises its `DataError`.
      workers: threads that encode ahead; 0 encodes on demand.
      statistics: of what was yielded.
    """

    corpus: Corpus
    encoder: RecordEncoder
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
        """Start at the first record."""
        if self.packing == "split" and not self.encoder.can_split:
            raise DataError(
                "data: packing 'split' cuts examples between rows, which only plain "
                "text allows; use packing 'pack'"
            )
        self._epoch, self._record, self._window = 0, 0, 0
        self._waiting: list[Example] = []
        self._epoch_has_examples = False
        self._settings = self.settings()

    @property
    def progress(self) -> float:
        """Epochs read so far, a fraction included."""
        return self._epoch + self._record / len(self.corpus)

    def settings(self) -> dict[str, object]:
        """What the batches depend on, besides the state."""
        return {
            "data": self.corpus.fingerprint,
            **self.encoder.settings(),
            "batch size": self.batch_size,
            "packing": self.packing,
            "look-ahead": self.look_ahead,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def state(self) -> dict[str, Any]:
        """The position after the last batch, for JSON."""
        return {
            "settings": self._settings,
            "epoch": self._epoch,
            "record": self._record,
            "window": self._window,
            "waiting": [list(example.origin) for example in self._waiting],
            "statistics": dataclasses.asdict(self.statistics),
        }

    def restore(self, state: JsonObject) -> None:
        """Go to the position of a state, of a stream with the same settings.

        Raises:
          DataError: the state is damaged, or of another stream.
        """
        try:
            before, now = dict(state["settings"]), self._settings
            for name in now:
                if before.get(name) != now[name]:
                    raise DataError(
                        f"data: the {name} was {before.get(name)!r} when the state was "
                        f"saved and is {now[name]!r} now; resume with what it was, or "
                        "start a new run"
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
            cut_examples = [
                examples[number][part].cut(start)[1] for number, part, start in waiting
            ]
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"data: the saved state is damaged ({error!r}); start a new run"
            ) from error
        self._epoch, self._record, self._window = epoch, record, window
        self._waiting, self.statistics = cut_examples, statistics

    def batches(self) -> Iterator[list[list[Example]]]:
        """Yield the rows of each batch; `state` is valid between two batches."""
        rows = self._rows()
        while batch := list(itertools.islice(rows, self.batch_size)):
            batch += [[] for _ in range(self.batch_size - len(batch))]
            self._count(batch)
            yield batch

    def _rows(self) -> Iterator[list[Example]]:
        """Rows of one epoch after another; no row has examples of two epochs."""
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
            if not self.statistics.examples and not self._epoch_has_examples:
                raise self._nothing()
            self._epoch, self._record, self._window = self._epoch + 1, 0, 0

    def _examples(self) -> Iterator[Example]:
        """The rest of the epoch; the position moves with each example."""
        counts = self.statistics
        self._epoch_has_examples = bool(self._waiting)
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
                        self._epoch_has_examples = True
                        self._record, self._window = record, window + 1
                        yield example
            self._record, self._window = record + 1, 0

    def _drop(self, error: DataError) -> None:
        policy = self.encoder.on_long if error.reason == "long" else self.on_bad
        if policy == "refuse":
            raise self._first_of_file(error)
        if self._epoch:  # it was counted in the first
            return
        counts = self.statistics
        counts.dropped[error.reason] = counts.dropped.get(error.reason, 0) + 1
        if len(counts.problems) < _MAX_PROBLEMS:
            counts.problems.append(str(error))

    def _first_of_file(self, error: DataError) -> DataError:
        """The first refused record in the order of the files, not of the epoch."""
        if not self.shuffle:
            return error
        in_order = dataclasses.replace(self, shuffle=False, statistics=Statistics())
        for start in range(0, len(self.corpus), _BLOCK):
            for result in in_order._block(self._epoch, start):
                if isinstance(result, DataError) and result.reason == error.reason:
                    return result
        return error

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
        """Records of an epoch from index `first` on, encoded ahead in threads."""
        starts = range(first, len(self.corpus), _BLOCK)
        if not self.workers:
            for start in starts:
                yield from enumerate(self._block(epoch, start), start)
            return
        pool = futures.ThreadPoolExecutor(self.workers, "llama_jax-encode")
        try:
            remaining = iter(starts)
            running: collections.deque[tuple[int, futures.Future]] = collections.deque()
            while True:
                for start in itertools.islice(
                    remaining, 3 * self.workers - len(running)
                ):
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
        """Encode the records at these indices of an epoch's order."""
        numbers = list(range(first, last))
        if self.shuffle:
            key = (self.seed, epoch)
            numbers = shuffled(first, last, len(self.corpus), key=key).tolist()
        prefer_text = self.encoder.prefer_text
        results: list[Encoded | DataError] = []
        for index, number in enumerate(numbers, start=first):
            try:
                record = parse(self.corpus.read(number), prefer_text=prefer_text)
                examples, truncated = self.encoder.encode(record, epoch, number)
                examples = [
                    example._replace(origin=(index, window, 0))
                    for window, example in enumerate(examples)
                ]
                results.append(Encoded(examples, truncated))
            except DataError as error:
                results.append(error)
        return results
