"""Tokenizers: text to token ids and back, whole or while a model generates."""

import dataclasses
import operator
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from llama_jax.arguments import checked
from llama_jax.errors import TokenizerError
from llama_jax.file_kinds import check_file
from llama_jax.text.added_words import AddedWords
from llama_jax.text.codec import TextStream, open_codec
from llama_jax.text.sentencepiece_codec import SentencePieces
from llama_jax.text.settings import AddedToken, TextSettings

FILE_NAMES = ("tokenizer.model", "tokenizer.json")
"""File names of tokenizers; the first takes precedence over the second."""

_NO_SETTINGS = TextSettings()


class InfillingIds(NamedTuple):
    """Ids of the special pieces of infilling; `end` ends a generated middle."""

    prefix: int
    suffix: int
    middle: int
    end: int


class Tokenizer:
    """A tokenizer file, and what else a checkpoint says about text.

    Three kinds of file are detected by their contents: SentencePiece models (Llama 1
    and 2, Code Llama), tiktoken ranks (Llama 3 from Meta), and `tokenizer.json` of
    either family (Hugging Face), in which byte-level tokenizers of any model are read.

    Args:
      contents: of the file.
      settings: what else the checkpoint says. Added tokens of ids in the file must have
        the same text as there.

    Attributes:
      contents: of the file.
      settings: as given, with the added tokens of the file, without what the file says
        itself.
      file_name: of the tokenizer in a checkpoint.
      vocab_size: number of ids in the file; a model may have more.
      bos_id, eos_id: begin and end of sequence, -1 if absent.
      unk_id, pad_id: unknown text and padding, -1 if absent.
      end_ids: ids that end an answer; the end of sequence is one.
      added_tokens: names of ids from `vocab_size` on.
      tokens: all special tokens and added words, by id.
      prefix_space: where a space is added to text, see `TextSettings`.
      special_texts: names that `encode_marked` reads as special tokens.
      infilling: ids of the infilling pieces, None without them.
      step_id: end of a message (Code Llama 70B Instruct), None without it.

    Raises:
      TokenizerError: the file is damaged or of an unknown kind, contradicts
        `settings`, or needs a package that is not installed.

    >>> import llama_jax
    >>> tokenizer = llama_jax.load().tokenizer
    >>> ids = tokenizer.encode("Once upon a time", bos=True, eos=False)
    >>> ids[0] == tokenizer.bos_id, tokenizer.decode(ids)
    (True, 'Once upon a time')
    """

    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int

    @checked(TokenizerError)
    def __init__(
        self, contents: bytes, *, settings: TextSettings = _NO_SETTINGS
    ) -> None:
        codec, added, prefix_space = open_codec(contents, settings)
        self._codec = codec
        self.contents = bytes(contents)
        self.file_name = codec.file_name
        self.vocab_size = codec.vocab_size

        # A setting that the file has itself is no setting, so that equal tokenizers
        # have equal settings.
        changes: dict[str, Any] = {}
        for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
            own, given = getattr(codec, name), getattr(settings, name)
            setattr(self, name, own if given is None else given)
            changes[name] = None if given == own else given
        for id, token in settings.added_tokens.items():
            known = added.get(id, token).text
            if id < self.vocab_size:
                known = "negative" if id < 0 else codec.piece(id)
            if known != token.text or id < 0:
                raise TokenizerError(
                    f"tokenizer: added token {token.text!r} has id {id}, which is "
                    + ("negative" if id < 0 else repr(known))
                    + "; give it another id"
                )
        added = {
            id: token
            for id, token in {**added, **settings.added_tokens}.items()
            if not self._codec_reads(id, token)
        }
        ends = dict.fromkeys((self.eos_id, *settings.end_ids))
        self.end_ids = tuple(id for id in ends if id >= 0)
        changes["end_ids"] = tuple(id for id in self.end_ids if id != self.eos_id)
        if settings.prefix_space == prefix_space:
            changes["prefix_space"] = None
        self.settings = dataclasses.replace(settings, added_tokens=added, **changes)
        self.prefix_space = codec.prefix_space
        self.tokens: Mapping[int, AddedToken] = MappingProxyType(
            {**codec.tokens, **added}
        )
        special = {id: token for id, token in self.tokens.items() if token.special}
        words = {id: token for id, token in added.items() if not token.special}
        self.special_texts = tuple(token.text for token in special.values())
        self._words = AddedWords(codec, words)
        self._marks = AddedWords(codec, special | words)
        self.added_tokens: Mapping[int, str] = MappingProxyType(
            {id: token.text for id, token in added.items() if id >= self.vocab_size}
        )
        self._added_ids = {name: i for i, name in self.added_tokens.items()}
        pieces = (self.piece_id(f"▁<{n}>") for n in ("PRE", "SUF", "MID", "EOT"))
        ids = [id for id in pieces if id is not None]
        self.infilling = InfillingIds(*ids) if len(ids) == 4 else None
        self.step_id = self.piece_id("<step>")

    @classmethod
    @checked(TokenizerError)
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        settings: TextSettings = _NO_SETTINGS,
    ) -> "Tokenizer":
        """Read a tokenizer file.

        Args:
          path: of the file.
          settings: as in `Tokenizer`.

        Raises:
          TokenizerError: the file cannot be read, and as in `Tokenizer`.
        """
        path = pathlib.Path(path)
        check_file(path, "tokenizer", TokenizerError)
        try:
            contents = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: cannot be read ({error.strerror}); name a tokenizer's file"
            ) from error
        try:
            return cls(contents, settings=settings)
        except TokenizerError as error:
            problem = str(error).removeprefix("tokenizer: ")
            raise TokenizerError(f"{path}: {problem}") from error

    def replace_settings(self, **changes: Any) -> "Tokenizer":
        """A tokenizer with other settings, by name as in `TextSettings`."""
        settings = dataclasses.replace(self.settings, **changes)
        return Tokenizer(self.contents, settings=settings)

    @property
    def has_pieces(self) -> bool:
        """Whether this is a SentencePiece model, not a byte-level BPE."""
        return isinstance(self._codec, SentencePieces)

    @property
    def model_proto(self) -> bytes:
        """The SentencePiece model: the file, or what it was converted to.

        Raises:
          TokenizerError: this is a byte-level BPE.
        """
        if not isinstance(self._codec, SentencePieces):
            raise TokenizerError(
                "tokenizer: is a byte-level BPE, which cannot be written as a "
                "SentencePiece model; choose a format with tokenizer.json"
            )
        return self._codec.model_proto

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Encode a text.

        Names of special tokens in the text are encoded as text; other added tokens are
        one id.

        Args:
          text: any valid Unicode.
          bos: whether to prepend the begin of sequence, if there is one.
          eos: whether to append the end of sequence, if there is one.

        Raises:
          TokenizerError: the text has half of a surrogate pair.
        """
        ids = self._words.encode(_checked(text), inner=False)
        begin, end = bos and self.bos_id >= 0, eos and self.eos_id >= 0
        return [self.bos_id] * begin + ids + [self.eos_id] * end

    def encode_marked(self, text: str) -> list[int]:
        """Encode a text in which the names of special tokens are those tokens.

        The ids are those of `transformers` with `add_special_tokens=False`. For text
        that was made by a template, never for a user's.

        Raises:
          TokenizerError: the text has half of a surrogate pair.

        >>> import llama_jax
        >>> llama_jax.load().tokenizer.encode_marked("<s>Once</s>")
        [1, 391, 2]
        """
        return self._marks.encode(_checked(text), inner=False)

    def encode_infilling(self, text: str) -> list[int]:
        """Encode a text without the leading space that SentencePiece adds.

        Raises:
          TokenizerError: the text has half of a surrogate pair.
        """
        return self._words.encode(_checked(text), inner=True)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids as SentencePiece or tiktoken does.

        SentencePiece's leading space is dropped, special pieces decode to nothing, and
        invalid UTF-8 to U+FFFD. Ids from `vocab_size` on decode to their added name (of
        byte-level tokenizers if they are not special), or to nothing.

        Raises:
          TokenizerError: an id is negative.
        """
        return self._decode(ids, inner=False)

    def decode_infilling(self, ids: Iterable[int]) -> str:
        """Decode ids with their leading space; the inverse of `encode_infilling`."""
        return self._decode(ids, inner=True)

    def _decode(self, ids: Iterable[int], *, inner: bool) -> str:
        ids = _integers(ids)
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            decoder = StreamDecoder(self, after_marker=inner)
            return decoder.push(ids) + decoder.flush()
        return self._codec.decode(ids, inner=inner)

    def token_text(self, id: int) -> str:
        """Decode one id: without leading space, a byte of a character as U+FFFD."""
        return self.decode([id])

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece or added token, None if there is no such piece.

        Args:
          piece: its exact text; SentencePiece writes spaces as `▁` (U+2581).
        """
        id = self._codec.piece_id(piece)
        return self._added_ids.get(piece) if id is None else id

    def piece(self, id: int) -> str:
        """The text of a piece or added token; the inverse of `piece_id`.

        Raises:
          TokenizerError: there is no such id.
        """
        if id in self.added_tokens:
            return self.added_tokens[id]
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(
                f"tokenizer: {id} is not a token id; ids are 0 … {self.vocab_size - 1}"
            )
        return self._codec.piece(id)

    def check_fits(self, vocab_size: int) -> None:
        """Check that a model has every id that text can encode to.

        Args:
          vocab_size: V, rows of the model's embedding.

        Raises:
          TokenizerError: the model lacks such an id.
        """
        for id, token in self.settings.added_tokens.items():
            if id >= max(vocab_size, self.vocab_size) and not token.special:
                raise TokenizerError(
                    f"tokenizer: its added word {token.text!r} has id {id}, which a "
                    f"model with vocab_size {vocab_size} lacks; is this another "
                    "model's tokenizer?"
                )
        for id in range(max(0, vocab_size), self.vocab_size):
            if self._codec.can_encode(id) or id in (self.bos_id, self.eos_id):
                raise TokenizerError(
                    f"tokenizer: its {self.vocab_size} pieces do not fit a model with "
                    f"vocab_size {vocab_size}, which lacks id {id} "
                    f"({self._codec.piece(id)!r}); is this another model's tokenizer?"
                )

    def unnamed_ids(self, vocab_size: int) -> tuple[int, ...]:
        """The ids below `vocab_size` that have no text and must never be sampled."""
        holes = tuple(id for id in self._codec.holes if id < vocab_size)
        extra = range(self.vocab_size, vocab_size)
        return holes + tuple(id for id in extra if id not in self.added_tokens)

    def _codec_reads(self, id: int, token: AddedToken) -> bool:
        """Whether a token is to the codec what it is as an added token."""
        # Space is added after an added token, but not after a user-defined piece.
        same = token.special or self._codec.prefix_space == "never"
        return same and self._codec.tokens.get(id) == token

    def open_stream(self, *, inner: bool) -> TextStream:
        """Create the part of a `StreamDecoder` that depends on the kind of file."""
        names = self.added_tokens
        if not self.has_pieces:  # its special tokens are invisible, as in its file
            names = {i: name for i, name in names.items() if not self.tokens[i].special}
        return self._codec.stream(names, inner=inner)


class StreamDecoder:
    """Streaming decoder, in constant time per id.

    The texts of all `push` calls and of `flush`, joined, equal
    `tokenizer.decode(all_ids)`, however the ids are split. Returned text never
    changes: a character of several tokens is returned whole.

    Args:
      tokenizer: of the ids.
      after_marker: equal `tokenizer.decode_infilling(all_ids)` instead.
    """

    def __init__(self, tokenizer: Tokenizer, *, after_marker: bool = False) -> None:
        self._stream = tokenizer.open_stream(inner=after_marker)

    def push(self, ids: Iterable[int]) -> str:
        """Append ids and return the text that they complete, "" if none.

        Raises:
          TokenizerError: an id is negative.
        """
        ids = _integers(ids)
        if ids and min(ids) < 0:
            raise TokenizerError(
                f"tokenizer: {min(ids)} is not a token id; ids are not negative"
            )
        return self._stream.push(ids)

    def flush(self) -> str:
        """Return the rest: U+FFFD for the bytes of an unfinished character."""
        return self._stream.flush()


def _checked(text: str) -> str:
    """The text, if it is valid Unicode."""
    try:
        text.encode()
    except AttributeError as error:
        raise TokenizerError(
            f"tokenizer: the text must be a string, got {text!r:.60}"
        ) from error
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"tokenizer: character {error.start} of the text is half of a surrogate "
            "pair, which UTF-8 cannot encode; remove it"
        ) from error
    return text


def _integers(ids: Iterable[int]) -> list[int]:
    """Ids of any integer type, or of an array, as Python's."""
    try:
        return list(map(operator.index, ids))
    except TypeError as error:
        raise TokenizerError(
            f"tokenizer: the ids must be a list of integers, got {ids!s:.60}"
        ) from error
