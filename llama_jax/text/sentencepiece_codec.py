"""SentencePiece models: Llama 1 and 2, Code Llama, and their descendants."""

from collections.abc import Iterable, Mapping

import sentencepiece

from llama_jax.errors import TokenizerError

_SPACE = "▁"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Text put in front of this sign is encoded, and decoded, without the space that
# SentencePiece adds to (and takes from) the beginning of a text.
_MARKER = "☺"


class SentencePieces:
    """A SentencePiece model as a `Codec`.

    Args:
      model_proto: the model, serialized.
      file_name: under which a checkpoint keeps it.

    Raises:
      TokenizerError: it is damaged, or lacks the pieces that every text needs.
    """

    holes: tuple[int, ...] = ()

    def __init__(self, model_proto: bytes, file_name: str = "tokenizer.model") -> None:
        sp = sentencepiece.SentencePieceProcessor()
        try:
            if not model_proto:  # SentencePiece takes it for a model without pieces
                raise RuntimeError("it is empty")
            sp.LoadFromSerializedProto(model_proto)
        except (RuntimeError, ValueError, TypeError) as error:
            raise TokenizerError(
                "tokenizer: not a SentencePiece model, or a damaged one"
            ) from error
        self.sp = sp
        self.model_proto = bytes(model_proto)
        self.file_name = file_name
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
        pieces = (sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.bytes = {id: b for b, id in enumerate(pieces) if sp.is_byte(id)}
        self._marker: list[int] = sp.encode(_MARKER)
        self._marker_chars = len(sp.decode(self._marker))
        self._inner_texts: dict[int, str] = {}

    def encode(self, text: str, *, inner: bool) -> list[int]:
        """Token ids; `inner` without the space in front."""
        if inner:
            ids: list[int] = self.sp.encode(_MARKER + text)
            return ids[len(self._marker) :]
        ids = self.sp.encode(text)
        return ids

    def decode(self, ids: list[int], *, inner: bool) -> str:
        """Text of pieces; `inner` with the leading space."""
        text: str = self.sp.decode(self._marker * inner + ids)
        return text[self._marker_chars * inner :]

    def stream(self, added: Mapping[int, str], *, inner: bool) -> "PieceStream":
        """A decoder of ids that arrive one by one."""
        return PieceStream(self, added, inner=inner)

    def piece(self, id: int) -> str:
        """How a piece is spelled."""
        piece: str = self.sp.id_to_piece(id)
        return piece

    def piece_id(self, piece: str) -> int | None:
        """Id of the piece that is spelled so."""
        id: int = self.sp.piece_to_id(piece)
        return id if id != self.unk_id or self.piece(id) == piece else None

    def can_encode(self, id: int) -> bool:
        """Whether text can become this piece."""
        return not (self.sp.is_unused(id) or self.sp.is_control(id))

    def inner_text(self, id: int) -> str:
        """Text of a piece that is not the first of its text."""
        text = self._inner_texts.get(id)
        if text is None:
            text = self.decode([id], inner=True)
            self._inner_texts[id] = text
        return text


class PieceStream:
    """Text of pieces as they arrive, in constant time for each.

    Args:
      pieces: whose ids they are.
      added: names of the ids beyond the pieces.
      inner: they go on with a text, and do not begin one.
    """

    def __init__(
        self, pieces: SentencePieces, added: Mapping[int, str], *, inner: bool
    ) -> None:
        self._pieces, self._added = pieces, added
        self._bytes = bytearray()  # the beginning of a character, if it is one
        # At the beginning of a text one leading space is dropped, which depends on
        # the pieces before only through the first that begins with a space. These
        # are held here until there is text; None afterwards.
        self._head: list[int] | None = None if inner else []

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, "" where they complete none."""
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
        """What is left at the end: U+FFFD for each byte of an unfinished character."""
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
