"""llama2.c's `tokenizer.bin` from and to a SentencePiece model."""

import math
import pathlib
import re
import struct

from llama_jax.errors import TokenizerError
from llama_jax.text.sentencepiece_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    Piece,
    model_of_pieces,
    pieces_of_model,
)
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

_SPACE = "▁"


def read_llama2c_tokenizer(path: pathlib.Path) -> bytes:
    """Return the SentencePiece model that a llama2.c `tokenizer.bin` was made from.

    Raises:
      TokenizerError: the file is damaged or of another kind.
    """
    return unpack_llama2c_tokenizer(path.read_bytes(), path)


def unpack_llama2c_tokenizer(data: bytes, path: Path) -> bytes:
    """Return the SentencePiece model in the contents of a `tokenizer.bin`.

    The file contains pieces and scores in the order of ids; everything else is the same
    for all Llama tokenizers.

    Args:
      data: contents of the file.
      path: of the file, for messages.

    Raises:
      TokenizerError: the file is damaged or of another kind.
    """
    pieces: list[Piece] = []
    offset, longest = 4, int.from_bytes(data[:4], "little")
    special = {0: ("<unk>", UNKNOWN), 1: ("\n<s>\n", CONTROL), 2: ("\n</s>\n", CONTROL)}
    while offset + 8 <= len(data):
        score, size = struct.unpack_from("<fi", data, offset)
        content = data[offset + 8 : offset + 8 + size]
        if not 0 < size <= longest or len(content) < size or not math.isfinite(score):
            break
        try:
            text = content.decode()
        except UnicodeDecodeError:
            break
        kind = BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL
        if len(pieces) in special:
            expected, kind = special[len(pieces)]
            # Some exports put newlines around all three, some around two.
            if text.strip("\n") != expected.strip("\n"):
                break
            text, score = expected.strip("\n"), 0.0
        pieces.append(Piece(text.replace(" ", _SPACE), score, kind))
        offset += 8 + size
    if offset != len(data) or len(pieces) < len(special):
        raise TokenizerError(
            f"{path}: is not a llama2.c tokenizer, or is damaged at byte {offset}; "
            "download it again"
        )
    return model_of_pieces(pieces)


def pack_llama2c_tokenizer(tokenizer: Tokenizer) -> bytes:
    """Return a llama2.c `tokenizer.bin` with the pieces of a SentencePiece model.

    Raises:
      TokenizerError: it has added tokens, which llama2.c would read as pieces of text,
        or is a byte-level BPE.
    """
    if tokenizer.added_tokens:
        id, name = next(iter(tokenizer.added_tokens.items()))
        raise TokenizerError(
            f"tokenizer: its added token {name!r} (id {id}) has no place in llama2.c's "
            "format, which has pieces of text only; choose another format"
        )
    encoded = []
    for id, piece in enumerate(pieces_of_model(tokenizer.model_proto)):
        text = piece.text.replace(_SPACE, " ")
        encoded.append(
            (piece.score, (f"\n{text}\n" if id in (1, 2) else text).encode())
        )
    longest = max(len(text) for _, text in encoded)
    return struct.pack("<i", longest) + b"".join(
        struct.pack("<fi", score, len(text)) + text for score, text in encoded
    )
