"""Training of a tokenizer: SentencePiece BPE with the settings of the Llama family."""

import io
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece

from llama_jax.checkpoint.atomic_write import new_file
from llama_jax.data.records import Content, Pair, read_records
from llama_jax.errors import DataError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "input_sentence_size": 200_000_000,
    "shuffle_input_sentence": True,
    "max_sentence_length": 4192,
    "max_sentencepiece_length": 16,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "split_digits": True,
    "treat_whitespace_as_suffix": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \N{DOUBLE QUESTION MARK} ",
}
"""Settings of Llama 1 and 2's tokenizer, from its file."""

_MAX_LINE_BYTES = 4192  # SentencePiece skips longer sentences


def train_tokenizer(
    files: Sequence[Path],
    path: Path,
    *,
    vocab_size: int = 32_000,
    separator: str = "<|endoftext|>",
) -> Tokenizer:
    """Train a tokenizer on all text of the records of files, and write it to `path`.

    It is trained line by line; lines of more than 4,192 bytes are cut.

    Args:
      files: .jsonl, .json, .txt, each also with .gz; .parquet.
      path: of a new `tokenizer.model`.
      vocab_size: V; 259 of its pieces are bytes and control pieces.
      separator: between the documents of a .txt.

    Raises:
      DataError: a file cannot be read, a record is malformed, or the text does not fit
        `vocab_size` (too little text, or too many characters).
      CheckpointError: `path` exists or cannot be written.
    """
    contents = train_model(
        (record.content for record in read_records(files, separator=separator)),
        vocab_size=vocab_size,
    )
    tokenizer = Tokenizer(contents)
    with new_file(path) as partial:
        partial.write_bytes(contents)
    return tokenizer


def train_model(contents: Iterable[Content], *, vocab_size: int) -> bytes:
    """Train a SentencePiece model on the contents of records.

    Raises:
      DataError: there is no text, or it does not fit `vocab_size`.
    """
    lines = _sentences(contents)
    if (first := next(lines, None)) is None:
        raise DataError("vocabulary: there is no text in the data to train on")
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=written,
            vocab_size=vocab_size,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
            **SETTINGS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"vocabulary: {vocab_size} pieces cannot be trained from this text "
            f"({reason}); choose another vocabulary size or give more text"
        ) from error
    return written.getvalue()


def _sentences(contents: Iterable[Content]) -> Iterator[str]:
    for content in contents:
        for text in _texts(content):
            for line in text.splitlines():
                yield from short_lines(line)


def _texts(content: Content) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Pair):
        yield from content
    else:
        for message in content.messages:
            yield message["content"]
            yield message.get("input", "")


def short_lines(line: str) -> Iterator[str]:
    """Cut a line into parts that SentencePiece accepts, at spaces if there are any."""
    data = line.encode(errors="replace")
    while len(data) > _MAX_LINE_BYTES:
        end = data.rfind(b" ", 1, _MAX_LINE_BYTES)
        if end < 0:
            end = _MAX_LINE_BYTES
            while data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield data[:end].decode()
        data = data[end:]
    if data.strip():
        yield data.decode()
