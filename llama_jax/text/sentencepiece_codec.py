"""SentencePiece models: Llama 1 and 2, Code Llama, and their descendants."""

from collections.abc import Collection, Iterable, Mapping

import sentencepiece

from llama_jax.errors import TokenizerError
from llama_jax.text.sentencepiece_proto import adjust_model, user_defined_ids
from llama_jax.text.settings import AddedToken, PrefixSpace

_SPACE = "▁"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A text after this character is encoded and decoded without the space that
# SentencePiece adds to (and removes from) the beginning of a text.
_MARKER = "☺"


class SentencePieces:
    """A SentencePiece model as a `Codec`.

    Args:
      model_proto: the model, serialized.
      file_name: of the tokenizer in a checkpoint.
      prefix_space: replaces the model's rule.
      control: ids of pieces that become control pieces.

    Attributes:
      prefix_space: where a space is added. A model by itself adds it to the beginning
        of a text. It is also added after special tokens, of which a model knows
        nothing, as `transformers` and llama.cpp do; but not after pieces that the
        model matches in text.
      tokens: control and user-defined pieces, and the unknown one, as added tokens.

    Raises:
      TokenizerError: the model is damaged, or lacks required pieces.
    """

    holes: tuple[int, ...]
    prefix_space: PrefixSpace

    def __init__(
        self,
        model_proto: bytes,
        file_name: str = "tokenizer.model",
        *,
        prefix_space: PrefixSpace | None = None,
        control: Collection[int] = (),
    ) -> None:
        sp = _load(model_proto)
        control = {
            id
            for id in control
            if 0 <= id < sp.vocab_size()
            and not (sp.is_control(id) or sp.is_unknown(id))
        }
        if prefix_space is not None or control:
            prefix = None if prefix_space is None else prefix_space != "never"
            model_proto = adjust_model(
                model_proto, add_dummy_prefix=prefix, control=control
            )
            sp = _load(model_proto)
        self.sp = sp
        self.model_proto = bytes(model_proto)
        self.file_name = file_name
        self.vocab_size: int = sp.vocab_size()
        self.holes = tuple(id for id in range(self.vocab_size) if sp.is_unused(id))
        self.bos_id: int = sp.bos_id()
        self.eos_id: int = sp.eos_id()
        self.unk_id: int = sp.unk_id()
        self.pad_id: int = sp.pad_id()
        if min(self.bos_id, self.eos_id, self.unk_id) < 0:
            raise TokenizerError(
                "tokenizer: lacks a piece for the begin of sequence, the end of "
                "sequence or unknown text; use a Llama model's tokenizer"
            )
        pieces = (sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.bytes = {id: b for b, id in enumerate(pieces) if sp.is_byte(id)}
        self._marker: list[int] = sp.encode(_MARKER)
        self._marker_chars = len(sp.decode(self._marker))
        self._inner_texts: dict[int, str] = {}
        words = user_defined_ids(model_proto)
        self.tokens: Mapping[int, AddedToken] = {
            id: AddedToken(self.piece(id), special=id not in words)
            for id in range(self.vocab_size)
            if sp.is_control(id) or sp.is_unknown(id) or id in words
        }
        if prefix_space is not None:
            self.prefix_space = prefix_space
        elif sp.normalize("x") == "x":
            self.prefix_space = "never"
        else:
            self.prefix_space = "always"

    def normalize(self, text: str) -> str:
        """The text in which normalized added tokens are searched."""
        if self.prefix_space.endswith("_once"):
            return text
        return _SPACE * (self.prefix_space == "always") + text.replace(" ", _SPACE)

    def encode(self, text: str, *, inner: bool) -> list[int]:
        """Encode a text; `inner` omits the leading space."""
        if inner:
            ids: list[int] = self.sp.encode(_MARKER + text)
            return ids[len(self._marker) :]
        ids = self.sp.encode(text)
        return ids

    def decode(self, ids: list[int], *, inner: bool) -> str:
        """Decode ids; `inner` keeps the leading space."""
        text: str = self.sp.decode(self._marker * inner + ids)
        return text[self._marker_chars * inner :]

    def stream(self, added: Mapping[int, str], *, inner: bool) -> "PieceStream":
        """Create a streaming decoder."""
        return PieceStream(self, added, inner=inner)

    def piece(self, id: int) -> str:
        """The text of a piece, with spaces as `▁`."""
        piece: str = self.sp.id_to_piece(id)
        return piece

    def piece_id(self, piece: str) -> int | None:
        """The id of the piece with this text, or None."""
        id: int = self.sp.piece_to_id(piece)
        return id if id != self.unk_id or self.piece(id) == piece else None

    def can_encode(self, id: int) -> bool:
        """Whether encoding some text can produce this id."""
        return not (self.sp.is_unused(id) or self.sp.is_control(id))

    def inner_text(self, id: int) -> str:
        """The decoded text of a piece that is not the first one."""
        text = self._inner_texts.get(id)
        if text is None:
            text = self.decode([id], inner=True)
            self._inner_texts[id] = text
        return text


def _load(model_proto: bytes) -> sentencepiece.SentencePieceProcessor:
    sp = sentencepiece.SentencePieceProcessor()
    try:
        if not model_proto:  # SentencePiece loads it as a model without pieces
            raise RuntimeError("it is empty")
        sp.LoadFromSerializedProto(model_proto)
    except (RuntimeError, ValueError, TypeError) as error:
        raise TokenizerError(
            "tokenizer: not a SentencePiece model, or a damaged one; download it again"
        ) from error
    return sp


class PieceStream:
    """Streaming decoder of SentencePiece ids, in constant time per id.

    Args:
      pieces: the model of the ids.
      added: names of ids beyond the pieces.
      inner: the ids continue a text and do not begin one.
    """

    def __init__(
        self, pieces: SentencePieces, added: Mapping[int, str], *, inner: bool
    ) -> None:
        self._pieces, self._added = pieces, added
        self._bytes = bytearray()  # of an unfinished character
        # One leading space of a text is dropped. Until there is text, whether it has
        # been dropped depends on the first piece that begins with a space, which is
        # stored here; None once there is text.
        self._head: list[int] | None = None if inner else []

    def push(self, ids: Iterable[int]) -> str:
        """Append ids and return the text that they complete, "" if none."""
        texts = []
        for id in ids:
            byte = self._pieces.bytes.get(id)
            if byte is None:
                texts += [self.flush(), self._piece(id)]
            else:
                self._bytes.append(byte)
                texts.append(self._characters())
        return "".join(texts)

    def flush(self) -> str:
        """Return the rest: U+FFFD for each byte of an unfinished character."""
        text = _REPLACEMENT * len(self._bytes)
        return self._emit(text, len(self._bytes))

    def _emit(self, text: str, num_bytes: int) -> str:
        del self._bytes[:num_bytes]
        if text:
            self._head = None
        return text

    def _piece(self, id: int) -> str:
        if id >= self._pieces.vocab_size:
            return self._emit(self._added.get(id, ""), 0)
        if self._head is None:
            return self._pieces.inner_text(id)
        text = self._pieces.decode([*self._head, id], inner=False)
        if not self._head and self._pieces.piece(id).startswith(_SPACE):
            self._head = [id]
        return self._emit(text, 0)

    def _characters(self) -> str:
        """Remove whole characters, and bytes that begin none, from the buffer."""
        texts = []
        while self._bytes and len(self._bytes) >= _character_length(self._bytes):
            length = _character_length(self._bytes)
            try:
                text = self._bytes[:length].decode()
            except UnicodeDecodeError:
                # SentencePiece replaces one byte and continues at the next.
                text, length = _REPLACEMENT, 1
            texts.append(self._emit(text, length))
        return "".join(texts)


def _character_length(data: bytearray) -> int:
    """The number of bytes needed to decode the first character of `data`."""
    lead = data[0]
    length = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
    continued = all(byte & 0xC0 == 0x80 for byte in data[1:length])
    return length if continued and lead < 0xF8 else 1
