"""`Tokenizer`: text to token ids and back, whole or while a model is still writing."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import sentencepiece

from llama_jax.errors import TokenizerError

_SPACE = "▁"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Text put in front of this sign is encoded, and decoded, without the space that
# SentencePiece adds to (and takes from) the beginning of a text.
_MARKER = "☺"


class InfillingIds(NamedTuple):
    """The pieces that frame an infilling prompt; `end` is where a middle stops."""

    prefix: int
    suffix: int
    middle: int
    end: int


class Tokenizer:
    """A SentencePiece model, with the names of the ids that a checkpoint added to it.

    Args:
      model_proto: contents of a `tokenizer.model`.
      added_tokens: id to name. An added id is never produced by `encode`; it decodes
        to its name. Names of ordinary pieces may be repeated, not contradicted.

    Attributes:
      model_proto: as given, to be stored beside a checkpoint.
      vocab_size: number of pieces; a model may have more ids than that.
      bos_id, eos_id, unk_id, pad_id: special pieces; pad is -1 where there is none.
      added_tokens: names of ids from `vocab_size` on.
      infilling: pieces of an infilling model, None for any other model.
      step_id: end of a message for Code Llama 70B Instruct, None for other models.

    Raises:
      TokenizerError: the model is damaged, or `added_tokens` contradicts it.
    """

    def __init__(
        self,
        model_proto: bytes,
        *,
        added_tokens: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        sp = sentencepiece.SentencePieceProcessor()
        try:
            if not model_proto:  # SentencePiece takes it for a model without pieces
                raise RuntimeError("it is empty")
            sp.LoadFromSerializedProto(model_proto)
        except (RuntimeError, ValueError, TypeError) as error:
            raise TokenizerError(
                "tokenizer: not a SentencePiece model, or a damaged one"
            ) from error
        self._sp = sp
        self.model_proto = bytes(model_proto)
        self.vocab_size: int = sp.vocab_size()
        self.bos_id: int = sp.bos_id()
        self.eos_id: int = sp.eos_id()
        self.unk_id: int = sp.unk_id()
        self.pad_id: int = sp.pad_id()
        if min(self.bos_id, self.eos_id, self.unk_id) < 0:
            raise TokenizerError(
                "tokenizer: it has no piece for the begin or the end of a sequence, or "
                "none for what is unknown"
            )
        for id, name in added_tokens.items():
            if id < self.vocab_size and (id < 0 or sp.id_to_piece(id) != name):
                raise TokenizerError(
                    f"tokenizer: added token {name!r} has id {id}, which "
                    + ("is negative" if id < 0 else f"is {sp.id_to_piece(id)!r}")
                )
        self.added_tokens: Mapping[int, str] = MappingProxyType(
            {i: name for i, name in added_tokens.items() if i >= self.vocab_size}
        )
        self._added_ids = {name: i for i, name in self.added_tokens.items()}
        named = (self.piece_id(f"{_SPACE}<{n}>") for n in ("PRE", "SUF", "MID", "EOT"))
        ids = [id for id in named if id is not None]
        self.infilling = InfillingIds(*ids) if len(ids) == 4 else None
        self.step_id = self.piece_id("<step>")

        pieces = (sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self._bytes = {id: b for b, id in enumerate(pieces) if sp.is_byte(id)}
        self._marker: list[int] = sp.encode(_MARKER)
        self._marker_chars = len(sp.decode(self._marker))
        self._inner_texts: dict[int, str] = {}

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        added_tokens: Mapping[int, str] = MappingProxyType({}),
    ) -> "Tokenizer":
        """Read a `tokenizer.model`, or say in a `TokenizerError` why it cannot be."""
        path = pathlib.Path(path)
        try:
            model_proto = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"tokenizer: cannot read {path}: {error.strerror}"
            ) from error
        try:
            return cls(model_proto, added_tokens=added_tokens)
        except TokenizerError as error:
            raise TokenizerError(f"{error}: {path}") from error

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of `text`, with the begin and end of sequence around it if asked.

        Special tokens that are spelled out in the text stay text.
        """
        ids = self._encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"tokenizer: character {error.start} of the text is half of a "
                "surrogate pair, which UTF-8 cannot hold"
            ) from error
        ids: list[int] = self._sp.encode(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, as SentencePiece gives it.

        The space in front of the first word is dropped, special pieces are invisible,
        and each byte that is not part of valid UTF-8 becomes U+FFFD. An id beyond the
        pieces becomes its added name, or nothing.
        """
        return self._decode(ids, after_marker=False)

    def _decode(self, ids: Iterable[int], *, after_marker: bool) -> str:
        ids = [int(id) for id in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            decoder = StreamDecoder(self, after_marker=after_marker)
            return decoder.push(ids) + decoder.flush()
        text: str = self._sp.decode(self._marker * after_marker + ids)
        return text[self._marker_chars * after_marker :]

    def encode_infilling(self, text: str) -> list[int]:
        """Token ids of `text` without the space that `encode` puts in front of it."""
        return self._encode(_MARKER + text)[len(self._marker) :]

    def decode_infilling(self, ids: Iterable[int]) -> str:
        """Text of `ids` with its leading space; the inverse of `encode_infilling`."""
        return self._decode(ids, after_marker=True)

    def token_text(self, id: int) -> str:
        """Text of one token alone: without its leading space, a lone byte as U+FFFD."""
        return self.decode([id])

    def piece_id(self, piece: str) -> int | None:
        """Id of the piece or added token spelled exactly so, None where there is none.

        A piece spells a space as `▁` (U+2581).
        """
        id: int = self._sp.piece_to_id(piece)
        if id != self.unk_id or self._sp.id_to_piece(id) == piece:
            return id
        return self._added_ids.get(piece)

    def check_fits(self, vocab_size: int) -> None:
        """Raise a `TokenizerError` if text can become an id that a model lacks.

        Args:
          vocab_size: V, rows of the model's embedding.
        """
        for id in range(max(0, vocab_size), self.vocab_size):
            if not (self._sp.is_unused(id) or self._sp.is_control(id)) or id in (
                self.bos_id,
                self.eos_id,
            ):
                raise TokenizerError(
                    f"tokenizer: its {self.vocab_size} pieces do not fit a model with "
                    f"vocab_size {vocab_size}, which lacks piece {id} "
                    f"({self._sp.id_to_piece(id)!r}); is it another model's tokenizer?"
                )

    def unnamed_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids below `vocab_size` that stand for no text and must never be sampled."""
        extra = range(self.vocab_size, vocab_size)
        return tuple(id for id in extra if id not in self.added_tokens)

    def _inner_text(self, id: int) -> str:
        """Text of a piece that is not the first of its text."""
        text = self._inner_texts.get(id)
        if text is None:
            text = self._sp.decode([*self._marker, id])[self._marker_chars :]
            self._inner_texts[id] = text
        return text


class StreamDecoder:
    """Turns ids into text while they arrive, in constant time for each.

    The pushed texts and the flushed one, joined, are exactly
    `tokenizer.decode(all_ids)`, however the ids were split. Text is returned once it
    cannot change any more: a character that spans several byte tokens comes whole.

    Args:
      tokenizer: whose ids they are.
      after_marker: join up to `tokenizer.decode_infilling(all_ids)` instead.
    """

    def __init__(self, tokenizer: Tokenizer, *, after_marker: bool = False) -> None:
        self._tokenizer = tokenizer
        self._bytes = bytearray()  # the beginning of a character, if it is one
        # At the beginning of a text one leading space is dropped, which depends on
        # the pieces before only through the first that begins with a space. These
        # are held here until there is text; None afterwards.
        self._head: list[int] | None = None if after_marker else []

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, "" where they complete none."""
        texts = []
        for id in ids:
            byte = self._tokenizer._bytes.get(id)
            if byte is None:
                texts += [self.flush(), self._piece(int(id))]
            else:
                self._bytes.append(byte)
                texts.append(self._characters())
        return "".join(texts)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for each byte of an unfinished character."""
        text = _REPLACEMENT * len(self._bytes)
        return self._emit(text, len(self._bytes))

    def _emit(self, text: str, num_bytes: int) -> str:
        del self._bytes[:num_bytes]
        if text:
            self._head = None
        return text

    def _piece(self, id: int) -> str:
        tokenizer = self._tokenizer
        if id < 0:
            raise TokenizerError(f"tokenizer: {id} is no token id")
        if id >= tokenizer.vocab_size:
            return self._emit(tokenizer.added_tokens.get(id, ""), 0)
        if self._head is None:
            return tokenizer._inner_text(id)
        text = tokenizer._sp.decode([*self._head, id])
        if not self._head and tokenizer._sp.id_to_piece(id).startswith(_SPACE):
            self._head = [id]
        return self._emit(text, 0)

    def _characters(self) -> str:
        """Take whole characters, and bytes that cannot begin one, off the buffer."""
        texts = []
        while self._bytes and len(self._bytes) >= _character_length(self._bytes):
            length = _character_length(self._bytes)
            try:
                text = self._bytes[:length].decode()
            except UnicodeDecodeError:
                # SentencePiece replaces one byte and tries again from the next.
                text, length = _REPLACEMENT, 1
            texts.append(self._emit(text, length))
        return "".join(texts)


def _character_length(data: bytearray) -> int:
    """Bytes needed to decide about the character that `data` seems to begin with."""
    lead = data[0]
    length = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
    continued = all(byte & 0xC0 == 0x80 for byte in data[1:length])
    return length if continued and lead < 0xF8 else 1
