"""`Tokenizer`: text to token ids and back, whole or while a model is still writing."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

from llama_jax.errors import TokenizerError
from llama_jax.text import byte_level_bpe as bytelevel
from llama_jax.text import sentencepiece_proto as piecemodel
from llama_jax.text.sentencepiece_codec import SentencePieces

FILE_NAMES = ("tokenizer.model", "tokenizer.json")
"""Names of the files that hold a tokenizer; where both lie together, the first."""


class InfillingIds(NamedTuple):
    """The pieces that frame an infilling prompt; `end` is where a middle stops."""

    prefix: int
    suffix: int
    middle: int
    end: int


@runtime_checkable
class Stream(Protocol):
    """Ids in, text out; what `StreamDecoder` says."""

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""

    def flush(self) -> str:
        """The text that is left."""


@runtime_checkable
class Codec(Protocol):
    """What one kind of tokenizer file can do; `Tokenizer` has the meaning of each.

    `inner` is for text that goes on with another text, and `holes` are the ids below
    `vocab_size` that stand for nothing. Ids that are given are in range, but a
    stream's may be larger; then they are named in `added`, or nothing.
    """

    file_name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    holes: tuple[int, ...]

    def encode(self, text: str, *, inner: bool) -> list[int]:
        """Token ids."""

    def decode(self, ids: list[int], *, inner: bool) -> str:
        """Text."""

    def stream(self, added: Mapping[int, str], *, inner: bool) -> Stream:
        """Text as the ids arrive."""

    def piece(self, id: int) -> str:
        """How a piece is spelled."""

    def piece_id(self, piece: str) -> int | None:
        """Which piece is spelled so."""

    def can_encode(self, id: int) -> bool:
        """Whether text can become this piece."""


class Tokenizer:
    """The pieces of a tokenizer file, with the names of ids that a checkpoint added.

    The file is one of three, told apart by what is in it: a SentencePiece model (Llama
    1 and 2, Code Llama), tiktoken's ranks (Llama 3, as Meta ships it), or the
    `tokenizer.json` of either family from Hugging Face.

    Args:
      contents: of the file.
      added_tokens: id to name. An added id is never produced by `encode`; it decodes
        to its name. Names of ordinary pieces may be repeated, not contradicted.

    Attributes:
      contents: as given, to be stored beside a checkpoint.
      file_name: under which name.
      vocab_size: number of pieces; a model may have more ids than that.
      bos_id, eos_id: begin and end of a sequence.
      unk_id, pad_id: what is unknown, and padding; -1 where there is none.
      added_tokens: names of ids from `vocab_size` on.
      infilling: pieces of an infilling model, None for any other model.
      step_id: end of a message for Code Llama 70B Instruct, None for other models.

    Raises:
      TokenizerError: the file is damaged or of an unknown kind, `added_tokens`
        contradicts it, or it needs a package that is not installed.
    """

    def __init__(
        self,
        contents: bytes,
        *,
        added_tokens: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        codec, added = _open(contents)
        self._codec = codec
        self.contents = bytes(contents)
        self.file_name = codec.file_name
        self.vocab_size = codec.vocab_size
        self.bos_id, self.eos_id = codec.bos_id, codec.eos_id
        self.unk_id, self.pad_id = codec.unk_id, codec.pad_id
        for id, name in added_tokens.items():
            known = added.get(id, name)
            if id < self.vocab_size:
                known = "negative" if id < 0 else codec.piece(id)
            if known != name or id < 0:
                raise TokenizerError(
                    f"tokenizer: added token {name!r} has id {id}, which "
                    + ("is negative" if id < 0 else f"is {known!r}")
                )
        added = {**added, **added_tokens}
        self.added_tokens: Mapping[int, str] = MappingProxyType(
            {i: name for i, name in added.items() if i >= self.vocab_size}
        )
        self._added_ids = {name: i for i, name in self.added_tokens.items()}
        named = (self.piece_id(f"▁<{n}>") for n in ("PRE", "SUF", "MID", "EOT"))
        ids = [id for id in named if id is not None]
        self.infilling = InfillingIds(*ids) if len(ids) == 4 else None
        self.step_id = self.piece_id("<step>")

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        *,
        added_tokens: Mapping[int, str] = MappingProxyType({}),
    ) -> "Tokenizer":
        """Read a tokenizer file, or say in a `TokenizerError` why it cannot be."""
        path = pathlib.Path(path)
        try:
            contents = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"tokenizer: cannot read {path}: {error.strerror}"
            ) from error
        try:
            return cls(contents, added_tokens=added_tokens)
        except TokenizerError as error:
            raise TokenizerError(f"{error}: {path}") from error

    @property
    def has_pieces(self) -> bool:
        """Whether it is a SentencePiece model, and not a byte-level one."""
        return isinstance(self._codec, SentencePieces)

    @property
    def model_proto(self) -> bytes:
        """The SentencePiece model, be it the file itself or made from another.

        Raises:
          TokenizerError: the tokenizer is a byte-level one.
        """
        if not isinstance(self._codec, SentencePieces):
            raise TokenizerError(
                "tokenizer: it is a byte-level one, which cannot be written as a "
                "SentencePiece model"
            )
        return self._codec.model_proto

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Token ids of `text`, with the begin and end of sequence around it if asked.

        Special tokens that are spelled out in the text stay text.
        """
        ids = self._encode(text, inner=False)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_infilling(self, text: str) -> list[int]:
        """Token ids of `text` without the space that `encode` puts in front of it.

        Byte-level tokenizers put none there.
        """
        return self._encode(text, inner=True)

    def _encode(self, text: str, *, inner: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"tokenizer: character {error.start} of the text is half of a "
                "surrogate pair, which UTF-8 cannot hold"
            ) from error
        return self._codec.encode(text, inner=inner)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, as SentencePiece or tiktoken gives it.

        The space that SentencePiece put in front of the first word is dropped, special
        pieces are invisible, and bytes that are not valid UTF-8 become U+FFFD. An id
        beyond the pieces becomes its added name, or nothing.
        """
        return self._decode(ids, inner=False)

    def decode_infilling(self, ids: Iterable[int]) -> str:
        """Text of `ids` with its leading space; the inverse of `encode_infilling`."""
        return self._decode(ids, inner=True)

    def _decode(self, ids: Iterable[int], *, inner: bool) -> str:
        ids = [int(id) for id in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            decoder = StreamDecoder(self, after_marker=inner)
            return decoder.push(ids) + decoder.flush()
        return self._codec.decode(ids, inner=inner)

    def token_text(self, id: int) -> str:
        """Text of one token alone: without its leading space, a lone byte as U+FFFD."""
        return self.decode([id])

    def piece_id(self, piece: str) -> int | None:
        """Id of the piece or added token spelled exactly so, None where there is none.

        A piece of SentencePiece spells a space as `▁` (U+2581).
        """
        id = self._codec.piece_id(piece)
        return self._added_ids.get(piece) if id is None else id

    def piece(self, id: int) -> str:
        """How the piece or added token is spelled; the inverse of `piece_id`."""
        if id in self.added_tokens:
            return self.added_tokens[id]
        if not 0 <= id < self.vocab_size:
            raise TokenizerError(f"tokenizer: {id} is no token id")
        return self._codec.piece(id)

    def check_fits(self, vocab_size: int) -> None:
        """Raise a `TokenizerError` if text can become an id that a model lacks.

        Args:
          vocab_size: V, rows of the model's embedding.
        """
        for id in range(max(0, vocab_size), self.vocab_size):
            if self._codec.can_encode(id) or id in (self.bos_id, self.eos_id):
                raise TokenizerError(
                    f"tokenizer: its {self.vocab_size} pieces do not fit a model with "
                    f"vocab_size {vocab_size}, which lacks piece {id} "
                    f"({self._codec.piece(id)!r}); is it another model's tokenizer?"
                )

    def unnamed_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Ids below `vocab_size` that stand for no text and must never be sampled."""
        holes = tuple(id for id in self._codec.holes if id < vocab_size)
        extra = range(self.vocab_size, vocab_size)
        return holes + tuple(id for id in extra if id not in self.added_tokens)

    def open_stream(self, *, inner: bool) -> Stream:
        """The part of a `StreamDecoder` that depends on the kind of file."""
        return self._codec.stream(self.added_tokens, inner=inner)


class StreamDecoder:
    """Turns ids into text while they arrive, in constant time for each.

    The pushed texts and the flushed one, joined, are exactly
    `tokenizer.decode(all_ids)`, however the ids were split. Text is returned once it
    cannot change any more: a character that spans several tokens comes whole.

    Args:
      tokenizer: whose ids they are.
      after_marker: join up to `tokenizer.decode_infilling(all_ids)` instead.
    """

    def __init__(self, tokenizer: Tokenizer, *, after_marker: bool = False) -> None:
        self._stream = tokenizer.open_stream(inner=after_marker)

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, "" where they complete none."""
        ids = [int(id) for id in ids]
        if ids and min(ids) < 0:
            raise TokenizerError(f"tokenizer: {min(ids)} is no token id")
        return self._stream.push(ids)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for the bytes of an unfinished character."""
        return self._stream.flush()


def _open(contents: bytes) -> tuple[Codec, dict[int, str]]:
    """The codec for a file, by what is in it, and names for ids beyond the pieces."""
    if bytelevel.is_ranks(contents):
        return bytelevel.from_ranks(contents), {}
    if contents[:1] != b"{":
        return SentencePieces(contents), {}
    try:
        described = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"tokenizer: is not JSON ({error}); download it again"
        ) from error
    model = described.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise TokenizerError(
            "tokenizer: it is JSON, but has no vocabulary; give the tokenizer.json "
            "that lies beside it"
        )
    steps = bytelevel.steps(described, "decoder")
    decoders = {str(step.get("type")) for step in steps}
    if model.get("type", "BPE") == "BPE" and "ByteLevel" in decoders:
        return bytelevel.from_json(contents, described), {}
    if model.get("type", "BPE") == "BPE" and model.get("byte_fallback"):
        proto, names = piecemodel.from_json(described)
        return SentencePieces(proto, "tokenizer.json"), names
    raise TokenizerError(
        f"tokenizer: a tokenizer.json with model {model.get('type')} and decoder "
        f"{', '.join(sorted(decoders)) or None} is not supported, only BPE "
        "of bytes or with bytes as a fallback; give its tokenizer.model, if it has one"
    )
