"""`Loader`: batches from files, ahead of the step that wants them.

Every process reads and encodes all records, and yields its own rows of the global
batch. Which records share a row depends on how many tokens they have, so no process
could pack its rows alone without making the batches depend on how many processes there
are, or the state on which of them saved it. One thread encodes 0.5 to 1.1 million
tokens a second; 256 TPU v5e at half their peak train a 7B model on 0.6 million.

Threads are enough, for SentencePiece encodes without holding Python's lock. Google's
Grain (0.2.18) was considered and left out. It has a random order, threads and a saved
position too, but its packing empties all its bins as soon as one example fits into
none, its worker processes and hosts cut the data before it is packed, and it brings six
packages, all for what is `stream` and this module here.
"""

import contextlib
import copy
import functools
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.data.batch import Batch, assemble, check_targets
from llama_jax.data.encode import Encoder, OnLong
from llama_jax.data.files import Corpus
from llama_jax.data.infilling import RATE
from llama_jax.data.records import OnBad
from llama_jax.data.stream import Packing, Statistics, Stream
from llama_jax.errors import DataError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

_SMALLEST_PIECE = 1 << 14
_BYTES_PER_TOKEN = 8  # more than text has


class Loader:
    """An iterator over batches: `for batch in Loader(files, tokenizer, ...)`.

    The batches depend on the files and the settings of `Stream.settings` alone: not on
    workers, prefetching or processes. A stopped iteration goes on where it was; a
    state that was saved goes on from there, bit for bit, with any number of processes.
    Each epoch has every record once; rows never have records of two epochs.

    Args:
      files: .jsonl, .json, .txt, each also with .gz; .parquet.
      tokenizer: the model's.
      format: one of `encode.DATA_FORMATS`.
      batch_size: B of the global batch, all processes together.
      length: T.
      packing: `"pack"` puts several records into a row, `"pad"` one; `"split"` fills
        rows to the end, and may cut a text where a row ends.
      epochs: the last batch may have empty rows then; None for ever.
      seed: of order and infilling.
      shuffle: whether each epoch has another order, or that of the files.
      on_bad: what becomes of a record that is malformed, cannot be written in the
        format, or has nothing to learn.
      on_long: what becomes of a record with answers that does not fit into T.
      infilling_rate: how many documents are transformed.
      process_index, process_count: which equal share of each batch's rows this is.
      workers: threads that encode; 0 for none.
      prefetch: batches that are made ahead; 0 to make each when it is asked for.
      look_ahead: how many records packing chooses from.
      separator: between the documents of a .txt.
      folder: where compressed files and Parquet are expanded, a temporary one if None.

    Attributes:
      statistics: of all batches that were yielded, all processes together.
      seconds_waited: how long batches were waited for.

    Raises:
      DataError: a file or a setting makes no sense; while iterating, a record that is
        to be refused.
      PromptError: there is no such format.
    """

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: Tokenizer,
        *,
        format: str,
        batch_size: int,
        length: int,
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
        encoder = Encoder(
            tokenizer=tokenizer,
            format=format,
            length=length,
            on_long=on_long,
            seed=seed,
            infilling_rate=infilling_rate,
        )
        corpus = Corpus(
            files,
            separator=separator,
            # Small pieces are shuffled better, and a window should fit into one.
            piece_bytes=max(_SMALLEST_PIECE, _BYTES_PER_TOKEN * length),
            folder=folder,
        )
        self.seconds_waited = 0.0
        self._new_stream = functools.partial(
            Stream,
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
        self._source: Iterator[tuple[Batch, dict[str, Any]]] | None = None
        self._state = self._new_stream().state()
        self._tokens_before = 0

    def __len__(self) -> int:
        """Records of an epoch."""
        return self._records

    def __iter__(self) -> "Loader":
        """Itself, to go on from the last batch that was yielded."""
        return self

    def __next__(self) -> Batch:
        """The next batch: this process's rows, NumPy arrays [B / processes, T]."""
        start = time.perf_counter()
        if self._source is None:
            self._source = self._open()
        try:
            batch, state = next(self._source)
        except DataError:
            self._source = None  # to say it again to who asks again
            raise
        self.seconds_waited += time.perf_counter() - start
        self._tokens_before = self._state["statistics"]["tokens"]
        self._state = state
        return batch

    @property
    def statistics(self) -> Statistics:
        """Counts of what was yielded."""
        return Statistics(**copy.deepcopy(self._state["statistics"]))

    @property
    def progress(self) -> float:
        """Epochs that were read for what was yielded, with their fraction."""
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
        """Statistics of the first epoch, which is read for nothing else.

        Divide `rows` by the batch size for the steps of an epoch; the others have about
        as many. What is to be refused is refused here, before any training.
        """
        stream = self._new_stream(epochs=1)
        for _ in stream.batches():
            pass
        return stream.statistics

    def state(self) -> dict[str, Any]:
        """The place behind the last batch, for JSON; the same in every process."""
        return copy.deepcopy(self._state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the batch after which `state` was taken.

        Raises:
          DataError: files or settings were others then, or it is no state.
        """
        stream = self._new_stream()
        stream.restore(state)
        self.close()
        self._state = stream.state()
        self._tokens_before = self._state["statistics"]["tokens"]

    def close(self) -> None:
        """Stop working ahead. The next batch, if one is asked for, is the next one."""
        if self._source is not None:
            self._source.close()  # type: ignore[attr-defined]
            self._source = None

    def __enter__(self) -> "Loader":
        """Itself, to be closed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _open(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        stream = self._new_stream()
        stream.restore(self._state)
        made = _make(stream, self._rows)
        return _ahead(made, self._prefetch) if self._prefetch > 0 else made


def _make(stream: Stream, own: slice) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """Each batch, of which only the rows of `own`, and the state behind it."""
    for rows in stream.batches():
        if not any(example.mask[1:].any() for row in rows for example in row):
            check_targets(assemble(rows, stream.encoder.length))
        yield assemble(rows[own], stream.encoder.length), stream.state()


def _ahead(
    source: Iterator[tuple[Batch, dict[str, Any]]], count: int
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """The same, made by a thread that is at most `count` ahead."""
    made: queue.Queue[Any] = queue.Queue(count)
    stopped = threading.Event()

    def put(item: Any) -> None:
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
