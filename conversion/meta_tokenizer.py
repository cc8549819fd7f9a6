"""The `tokenizer.model` of Meta's folders.

Meta's code takes the number of its pieces for the model's `vocab_size`, and reads
nothing else about text. So added tokens become pieces.
"""

from llama_jax.errors import TokenizerError
from llama_jax.text.byte_level_bpe import is_ranks
from llama_jax.text.sentencepiece_proto import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    Piece,
    append_pieces,
)
from llama_jax.text.settings import filler
from llama_jax.text.tokenizer import Tokenizer

_SPACE = "▁"


def meta_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> bytes:
    """Return the contents of the file.

    Args:
      tokenizer: of the model.
      vocab_size: of the model; ids without a token become unused pieces.

    Raises:
      TokenizerError: the tokenizer has no form that Meta's code reads.
    """
    if is_ranks(tokenizer.contents):
        if tokenizer.added_tokens:
            name = next(iter(tokenizer.added_tokens.values()))
            raise TokenizerError(
                f"tokenizer: its added token {name!r} has no place in Meta's format, "
                "in which Llama 3's ranks are followed by the same 256 special tokens; "
                "choose another format"
            )
        return tokenizer.contents
    model_proto = tokenizer.model_proto
    pieces = []
    for id in range(tokenizer.vocab_size, vocab_size):
        token = tokenizer.tokens.get(id)
        if token is None:
            pieces.append(Piece(filler(id), 0.0, UNUSED))
        elif token.special:
            pieces.append(Piece(token.text, 0.0, CONTROL))
        else:
            text = token.text.replace(" ", _SPACE)
            pieces.append(Piece(text, 0.0, USER_DEFINED))
    for piece in pieces:
        if tokenizer.piece_id(piece.text) not in (None, *tokenizer.added_tokens):
            raise TokenizerError(
                f"tokenizer: its added token {piece.text!r} is a piece of the model "
                "too, which Meta's format cannot store; choose another format"
            )
    return append_pieces(model_proto, pieces)
