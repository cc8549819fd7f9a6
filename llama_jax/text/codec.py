"""The kinds of tokenizer files, which their contents decide."""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from llama_jax.errors import TokenizerError
from llama_jax.text import byte_level_bpe, sentencepiece_json
from llama_jax.text.byte_level_json import steps
from llama_jax.text.sentencepiece_codec import SentencePieces
from llama_jax.text.settings import AddedToken, PrefixSpace, TextSettings


@runtime_checkable
class TextStream(Protocol):
    """Ids in, text out; see `StreamDecoder`."""

    def push(self, ids: Iterable[int]) -> str:
        """Append ids and return the text that they complete."""

    def flush(self) -> str:
        """Return the remaining text."""


@runtime_checkable
class Codec(Protocol):
    """One kind of tokenizer file; attributes and methods are those of `Tokenizer`.

    `inner` means that a text continues another text. `holes` are unused ids below
    `vocab_size`. Ids are in range, except those of a stream: larger ones decode to
    their name in `added`, or to nothing. `tokens` are pieces that `transformers` reads
    as added tokens: special ones, and those that the file's own code finds in text.
    """

    file_name: str
    vocab_size: int
    bos_id: int
    eos_id: int
    unk_id: int
    pad_id: int
    holes: tuple[int, ...]
    prefix_space: PrefixSpace
    tokens: Mapping[int, AddedToken]

    def normalize(self, text: str) -> str:
        """The text in which normalized added tokens are searched."""

    def encode(self, text: str, *, inner: bool) -> list[int]:
        """Encode a text."""

    def decode(self, ids: list[int], *, inner: bool) -> str:
        """Decode ids."""

    def stream(self, added: Mapping[int, str], *, inner: bool) -> TextStream:
        """Create a streaming decoder."""

    def piece(self, id: int) -> str:
        """The text of a piece."""

    def piece_id(self, piece: str) -> int | None:
        """The id of a piece."""

    def can_encode(self, id: int) -> bool:
        """Whether encoding some text can produce this id."""


class OpenedCodec(NamedTuple):
    """A tokenizer file.

    Attributes:
      codec: with the changes of the settings.
      added_tokens: of the file, by id.
      prefix_space: the file's own rule.
    """

    codec: Codec
    added_tokens: Mapping[int, AddedToken]
    prefix_space: PrefixSpace


def open_codec(contents: bytes, settings: TextSettings) -> OpenedCodec:
    """Open a tokenizer file.

    Args:
      contents: of the file.
      settings: what replaces the file's rules of spaces and special tokens.

    Raises:
      TokenizerError: as in `Tokenizer`.
    """
    if byte_level_bpe.is_ranks(contents):
        return OpenedCodec(*byte_level_bpe.from_ranks(contents), "never")
    if contents[:1] != b"{":
        return _open_pieces(contents, {}, None, "tokenizer.model", settings)
    try:
        spec = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(
            f"tokenizer: is not JSON ({error}); download it again"
        ) from error
    model = spec.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise TokenizerError(
            "tokenizer: is JSON without a vocabulary; use the tokenizer.json next to it"
        )
    decoders = {str(step.get("type")) for step in steps(spec, "decoder")}
    if model.get("type", "BPE") == "BPE" and "ByteLevel" in decoders:
        return OpenedCodec(*byte_level_bpe.from_json(spec), "never")
    if model.get("type", "BPE") == "BPE" and model.get("byte_fallback"):
        return _open_pieces(
            *sentencepiece_json.from_json(spec), "tokenizer.json", settings
        )
    raise TokenizerError(
        f"tokenizer: a tokenizer.json with model {model.get('type')} and decoder "
        f"{', '.join(sorted(decoders)) or None} is not supported; use one with "
        "byte-level BPE or BPE with byte fallback, or its tokenizer.model"
    )


def _open_pieces(
    model_proto: bytes,
    added: Mapping[int, AddedToken],
    own: PrefixSpace | None,
    file_name: str,
    settings: TextSettings,
) -> OpenedCodec:
    tokens = {**added, **settings.added_tokens}
    control = {id for id, token in tokens.items() if token.special}
    codec = SentencePieces(model_proto, file_name, prefix_space=own, control=control)
    own = codec.prefix_space
    if settings.prefix_space not in (None, own):
        codec = SentencePieces(
            model_proto, file_name, prefix_space=settings.prefix_space, control=control
        )
    return OpenedCodec(codec, added, own)
