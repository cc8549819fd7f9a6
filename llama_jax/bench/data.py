"""Data: tokens per second of the loader, and of each of its stages alone."""

import dataclasses
import pathlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from llama_jax.data.batch import Example, assemble, pack
from llama_jax.data.encode import Encoder
from llama_jax.data.files import Corpus
from llama_jax.data.loader import Loader
from llama_jax.data.records import parse
from llama_jax.data.stream import Packing
from llama_jax.errors import DataError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

_Result = TypeVar("_Result")

_DOCUMENTS = 400
_VOCABULARY = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataReport:
    """Loading of batches as fast as possible, for an epoch or a number of tokens.

    Attributes:
      records: number of records read.
      tokens: number of tokens in the batches.
      fill_rate: fraction of the batches' slots that contain a token.
      open_seconds: to index the records.
      seconds: to load all batches.
      tokens_per_s: of loading.
      read_tokens_per_s: of reading and parsing alone.
      encode_tokens_per_s: of tokenizing alone.
      pack_tokens_per_s: of packing and filling arrays alone.
    """

    records: int
    tokens: int
    fill_rate: float
    open_seconds: float
    seconds: float
    tokens_per_s: float
    read_tokens_per_s: float
    encode_tokens_per_s: float
    pack_tokens_per_s: float


def measure_data(
    files: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    format: str,
    batch_size: int,
    length: int,
    packing: Packing = "pack",
    workers: int = 1,
    max_tokens: int = 3_000_000,
) -> DataReport:
    """Load the batches of one epoch, at most about `max_tokens` tokens.

    Args:
      files: in any supported format; if empty, text is generated.
      tokenizer: the model's.
      format: of the records.
      batch_size: B.
      length: T.
      packing: how rows are filled.
      workers: threads.
      max_tokens: tokens after which to stop.
    """
    with tempfile.TemporaryDirectory() as name:
        files = files or [_generate_text(pathlib.Path(name) / "words.txt")]
        start = time.perf_counter()
        loader = Loader(
            files,
            tokenizer,
            format=format,
            batch_size=batch_size,
            length=length,
            packing=packing,
            epochs=1,
            on_bad="drop",
            workers=workers,
        )
        opened = time.perf_counter()
        with loader:
            for _ in loader:
                if loader.statistics.tokens >= max_tokens:
                    break
        seconds = time.perf_counter() - opened
        statistics = loader.statistics
        encoder = Encoder(tokenizer=tokenizer, format=format, length=length)
        stages = _stages(files, encoder, batch_size, packing, statistics.records)
    return DataReport(
        records=statistics.records,
        tokens=statistics.tokens,
        fill_rate=statistics.fill_rate,
        open_seconds=opened - start,
        seconds=seconds,
        tokens_per_s=statistics.tokens / seconds,
        **stages,
    )


def _stages(
    files: Sequence[Path], encoder: Encoder, B: int, packing: Packing, limit: int
) -> dict[str, float]:
    corpus = Corpus(files)
    prefer_text = encoder.format in ("text", "infilling")

    def parsed(number: int) -> list:
        try:
            return [parse(corpus.read(number), prefer_text=prefer_text)]
        except DataError:
            return []

    def encoded(record: object) -> list[Example]:
        try:
            return encoder.encode(record).examples  # type: ignore[arg-type]
        except DataError:
            return []

    def batches() -> None:
        rows = [[example] for example in examples]
        if packing != "pad":
            split = packing == "split"
            rows = list(pack(examples, encoder.length, split=split))
        for start in range(0, len(rows), B):
            assemble(rows[start : start + B], encoder.length)

    numbers = range(min(limit, len(corpus)))
    records, reading = _timed(lambda: [r for n in numbers for r in parsed(n)])
    examples, encoding = _timed(lambda: [e for r in records for e in encoded(r)])
    _, packed = _timed(batches)
    tokens = sum(example.size for example in examples)
    return {
        "read_tokens_per_s": tokens / reading,
        "encode_tokens_per_s": tokens / encoding,
        "pack_tokens_per_s": tokens / packed,
    }


def _timed(work: Callable[[], _Result]) -> tuple[_Result, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def _generate_text(path: pathlib.Path) -> pathlib.Path:
    """Write documents of random words, the same in every call."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwyp"
    words = [
        "".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(_VOCABULARY)
    ]
    with path.open("w") as file:
        for _ in range(_DOCUMENTS):
            text = " ".join(draw.choices(words, k=draw.randint(50, 200)))
            file.write(f"{text}.\n<|endoftext|>\n")
    return path
