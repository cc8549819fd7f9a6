"""`Loader`: batches from files, read ahead of the training step.

Every process reads and encodes all records, and yields its own rows of the global
batch. Which records share a row depends on their numbers of tokens; if each process
packed its own rows, batches would depend on the number of processes, and states on the
process that saved them. One thread encodes 0.5 to 1.1 million tokens a second; 256 TPU
v5e at half their peak train a 7B model on 0.6 million.

Threads suffice, as SentencePiece releases Python's lock. Google's Grain (0.2.18) has a
random order, threads and a saved position too, but its packing empties all bins as soon
as one example fits into none, its workers and hosts split the data before packing, and
it depends on six packages.
"""

import contextlib
import copy
import datetime
import functools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.arguments import checked
from llama_jax.data.batch import Batch, assemble, check_targets
from llama_jax.data.encode import (
    AUTO,
    EncodeFunction,
    Encoder,
    FunctionEncoder,
    OnLong,
    RecordEncoder,
    choose_format,
)
from llama_jax.data.files import Corpus
from llama_jax.data.infilling import RATE
from llama_jax.data.records import OnBad
from llama_jax.data.stream import Packing, RowStream, Statistics
from llama_jax.errors import DataError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import JsonObject, Path

_Read = tuple[Batch, dict[str, Any]]
"""A batch, and the position after it."""

_SMALLEST_PIECE = 1 << 14
_BYTES_PER_TOKEN = 8  # more than text has


class Loader:
    """An iterator over batches: `for batch in Loader(files, tokenizer, ...)`.

    Batches depend only on the files and on `RowStream.settings`: not on workers,
    prefetching or processes. A new iteration continues after the last batch; so does a
    loader with a restored state, bit for bit, with any number of processes. Each epoch
    has every record once, and no row has records of two epochs.

    Args:
      files: .jsonl, .json, .txt, each also with .gz; .parquet.
      tokenizer: of the model.
      format: one of `encode.DATA_FORMATS`, or a named template as in `get_format`.
        "auto" is the checkpoint's chat template if there is one and the first record is
        a dialog, otherwise "text".
      batch_size: B of the global batch, over all processes.
      length: T.
      encoder: makes examples of records instead of `tokenizer` and `format`; a function
        of a `Record`, or a `RecordEncoder`.
      packing: "pack" puts several records into a row, "pad" one; "split" fills rows to
        the end, cutting a text where a row ends.
      epochs: after which the loader ends, perhaps with empty rows; None never ends.
      seed: of order and infilling.
      shuffle: shuffle each epoch, or keep the order of the files.
      on_bad: what to do with a record that is malformed, cannot be written in the
        format, or has nothing to learn.
      on_long: what to do with a record with answers that does not fit into T.
      infilling_rate: fraction of documents that are transformed.
      process_index, process_count: which equal share of the rows to yield.
      workers: threads that encode; 0 for none.
      prefetch: batches to make ahead; 0 makes each on demand.
      look_ahead: records that packing chooses from.
      separator: between the documents of a .txt.
      folder: where compressed files and Parquet are expanded; None is a temporary one.
      now: the time that a chat template sees; None is the time of each record.

    Attributes:
      format: as given; what was chosen instead of "auto".
      statistics: of all batches that were yielded, over all processes.
      seconds_waited: time spent waiting for batches.

    Raises:
      DataError: a file cannot be read, or a setting is out of range; while iterating, a
        record is refused.
      PromptError: there is no such format.

    >>> import pathlib, tempfile, llama_jax
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "data.txt"
    >>> _ = file.write_text("Once upon a time there was a cat.")
    >>> tokenizer = llama_jax.open_model().tokenizer
    >>> loader = Loader([file], tokenizer, format="text", batch_size=1, length=8)
    >>> tokenizer.decode(next(loader).tokens[0, 1:].tolist())
    'Once upon a time there was a'
    """

    @checked(DataError)
    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Tokenizer | None = None,
        *,
        batch_size: int,
        length: int,
        format: str = AUTO,
        encoder: RecordEncoder | EncodeFunction | None = None,
        packing: Packing = "pack",
        epochs: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        on_bad: OnBad = "refuse",
        on_long: OnLong = "drop",
        infilling_rate: float = RATE,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 1,
        prefetch: int = 4,
        look_ahead: int = 64,
        separator: str = "<|endoftext|>",
        folder: Path | None = None,
        now: datetime.datetime | None = None,
    ) -> None:
        if not 0 <= process_index < process_count or batch_size % process_count:
            raise DataError(
                f"data: {batch_size} rows for process {process_index} of "
                f"{process_count}; the number of processes must divide the batch size"
            )
        if batch_size < 1 or (epochs is not None and epochs < 1) or look_ahead < 1:
            raise DataError(
                f"data: batch size {batch_size}, {epochs} epochs and look-ahead "
                f"{look_ahead} must be at least 1"
            )
        corpus = Corpus(
            files,
            separator=separator,
            # Small pieces shuffle better, but a window should fit into one.
            piece_bytes=max(_SMALLEST_PIECE, _BYTES_PER_TOKEN * length),
            folder=folder,
        )
        if encoder is None:
            if tokenizer is None:
                raise DataError("data: there is no tokenizer; give one, or an encoder")
            if format == AUTO:
                format = choose_format(corpus, tokenizer)
            encoder = Encoder(
                tokenizer=tokenizer,
                format=format,
                length=length,
                on_long=on_long,
                seed=seed,
                infilling_rate=infilling_rate,
                now=now,
            )
        elif not isinstance(encoder, RecordEncoder):
            encoder = FunctionEncoder(function=encoder, length=length, on_long=on_long)
        if encoder.length != length:
            raise DataError(
                f"data: the encoder's length is {encoder.length}, but length is "
                f"{length}; make them equal"
            )
        self.format = format
        self.seconds_waited = 0.0
        self._new_stream = functools.partial(
            RowStream,
            corpus=corpus,
            encoder=encoder,
            batch_size=batch_size,
            packing=packing,
            look_ahead=look_ahead,
            shuffle=shuffle,
            seed=seed,
            epochs=epochs,
            on_bad=on_bad,
            workers=workers,
        )
        self._records = len(corpus)
        share = batch_size // process_count
        self._rows = slice(process_index * share, (process_index + 1) * share)
        self._prefetch = prefetch
        self._source: Iterator[_Read] | None = None
        self._state = self._new_stream().state()
        self._tokens_before = 0

    def __len__(self) -> int:
        """The number of records of an epoch."""
        return self._records

    def __iter__(self) -> "Loader":
        """The loader, which continues after the last batch."""
        return self

    def __next__(self) -> Batch:
        """The next batch: this process's rows, NumPy arrays [B / processes, T]."""
        start = time.perf_counter()
        if self._source is None:
            self._source = self._open()
        try:
            batch, state = next(self._source)
        except DataError:
            self._source = None  # the next call raises it again
            raise
        self.seconds_waited += time.perf_counter() - start
        self._tokens_before = self._state["statistics"]["tokens"]
        self._state = state
        return batch

    @property
    def statistics(self) -> Statistics:
        """Counts of what was yielded, over all processes."""
        return Statistics(**copy.deepcopy(self._state["statistics"]))

    @property
    def progress(self) -> float:
        """Epochs read for what was yielded, a fraction included."""
        return self._state["epoch"] + self._state["record"] / self._records

    def facts(self) -> dict[str, float]:
        """Numbers of the last batch, of all processes together, for a step's record.

        Returns:
          `tokens` of the batch, `epoch` (passes over the data so far) and `records`
          read so far.
        """
        statistics = self._state["statistics"]
        return {
            "tokens": statistics["tokens"] - self._tokens_before,
            "epoch": round(self.progress, 6),
            "records": statistics["records"],
        }

    def survey(self) -> Statistics:
        """Read the first epoch for its statistics alone.

        Its steps are `rows` divided by the batch size; other epochs have about as many.
        Records that are refused raise here, before any training.
        """
        stream = self._new_stream(epochs=1)
        for _ in stream.batches():
            pass
        return stream.statistics

    def state(self) -> dict[str, Any]:
        """The position after the last batch, for JSON; the same in every process."""
        return copy.deepcopy(self._state)

    def restore(self, state: JsonObject) -> None:
        """Go to the position of a state.

        Raises:
          DataError: the state is damaged, or of other files or settings.
        """
        stream = self._new_stream()
        stream.restore(state)
        self.close()
        self._state = stream.state()
        self._tokens_before = self._state["statistics"]["tokens"]

    def close(self) -> None:
        """Stop reading ahead; the loader still continues with the next batch."""
        if self._source is not None:
            self._source.close()  # type: ignore[attr-defined]
            self._source = None

    def __enter__(self) -> "Loader":
        """The loader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _open(self) -> Iterator[_Read]:
        stream = self._new_stream()
        stream.restore(self._state)
        made = _make(stream, self._rows)
        return _ahead(made, self._prefetch) if self._prefetch > 0 else made


def _make(stream: RowStream, own: slice) -> Iterator[_Read]:
    """The rows `own` of each batch, and the state after it."""
    for rows in stream.batches():
        if not any(example.mask[1:].any() for row in rows for example in row):
            check_targets(assemble(rows, stream.encoder.length))
        yield assemble(rows[own], stream.encoder.length), stream.state()


def _ahead(source: Iterator[_Read], count: int) -> Iterator[_Read]:
    """The same items, made by a thread that is up to `count` ahead."""
    made: queue.Queue[Any] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in source:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)
        finally:
            source.close()  # type: ignore[attr-defined]

    threading.Thread(target=work, name="llama_jax-batches", daemon=True).start()
    try:
        while (item := made.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
