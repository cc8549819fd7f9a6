"""The tokenizer of a GGUF file, from and to ours."""

from llama_jax.conversion.config_fields import short_repr
from llama_jax.conversion.gguf_byte_level import byte_level_pieces, read_byte_level
from llama_jax.conversion.gguf_header import (
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    Header,
    MetadataValue,
)
from llama_jax.conversion.gguf_sentencepiece import (
    adds_space_prefix,
    read_sentencepiece,
)
from llama_jax.conversion.gguf_text_settings import (
    SETTINGS,
    agrees,
    own_settings,
    read_own_settings,
    settings_metadata,
)
from llama_jax.conversion.gguf_vocabulary import OTHER_TOKENIZER, TOKENIZER, read_text
from llama_jax.errors import TokenizerError
from llama_jax.text.sentencepiece_proto import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    Piece,
    pieces_of_model,
)
from llama_jax.text.settings import AddedToken, TextSettings
from llama_jax.text.tokenizer import Tokenizer

_ADDED_SCORE = -1000.0  # of added tokens, as in llama.cpp's converter


def read_tokenizer(header: Header) -> Tokenizer:
    """Return the tokenizer in a file.

    Raises:
      TokenizerError: there is none, it is of another kind, or it is damaged.
    """
    kind = read_text(header, f"{TOKENIZER}model")
    own = read_own_settings(header)
    match kind:
        case "llama":
            contents, settings = read_sentencepiece(header, own and own[0])
        case "gpt2":
            contents, settings = read_byte_level(header)
        case _:
            problem = f"has a tokenizer of the unknown kind {short_repr(kind)}"
            if kind is None or kind == "no_vocab":
                problem = "has no tokenizer"
            raise TokenizerError(f"{header.path}: {problem}; {OTHER_TOKENIZER}")
    try:
        if own is not None:
            # Other programs may have changed the file since.
            tokenizer = Tokenizer(contents, settings=own[1])
            same_words = _words(tokenizer.settings) == _words(settings)
            size = header.entries[f"{TOKENIZER}tokens"].length or 0
            if same_words and agrees(header, settings_metadata(tokenizer, size)):
                return tokenizer
        return Tokenizer(contents, settings=settings)
    except TokenizerError as error:
        raise TokenizerError(f"{header.path}: {error}; {OTHER_TOKENIZER}") from error


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int
) -> dict[str, MetadataValue]:
    """Return the metadata of a tokenizer.

    Ids without a name become unused tokens: llama.cpp needs a token for each row of the
    embedding.

    Args:
      tokenizer: of the model, if any.
      vocab_size: of the model.

    Raises:
      ConfigError: it has rules that llama.cpp does not implement.
      TokenizerError: it has more pieces than the model has ids.
    """
    if tokenizer is None:
        return {f"{TOKENIZER}model": MetadataValue(STRING, "no_vocab")}
    tokenizer.check_fits(vocab_size)
    added = tokenizer.settings.added_tokens
    if tokenizer.has_pieces:
        model, pre = "llama", "default"
        pieces = dict(enumerate(pieces_of_model(tokenizer.model_proto)))
    else:
        texts, merges, pre = byte_level_pieces(tokenizer)
        model = "gpt2"
        pieces = {id: Piece(text, 0.0) for id, text in texts.items()}
    tokens = [_token(id, pieces.get(id), added.get(id)) for id in range(vocab_size)]
    metadata = {
        "model": MetadataValue(STRING, model),
        "pre": MetadataValue(STRING, pre),
        "tokens": MetadataValue(STRING, [token.text for token in tokens]),
        "token_type": MetadataValue(INT32, [token.kind for token in tokens]),
    }
    if tokenizer.has_pieces:
        scores = [token.score for token in tokens]
        metadata["scores"] = MetadataValue(FLOAT32, scores)
        prefix = adds_space_prefix(tokenizer)
        metadata["add_space_prefix"] = MetadataValue(BOOL, prefix)
    else:
        joined = [" ".join(pair) for pair in merges]
        metadata["merges"] = MetadataValue(STRING, joined)
    return {
        **{TOKENIZER + key: value for key, value in metadata.items()},
        **settings_metadata(tokenizer, vocab_size),
        SETTINGS: own_settings(tokenizer),
    }


def _token(id: int, piece: Piece | None, added: AddedToken | None) -> Piece:
    """A token as files describe it; user-defined pieces have spaces for `▁`."""
    if piece is not None:
        if piece.kind != USER_DEFINED:
            return piece
        return piece._replace(text=piece.text.replace("▁", " "))
    if added is None:
        return Piece(f"[PAD{id}]", _ADDED_SCORE, UNUSED)
    kind = CONTROL if added.special else USER_DEFINED
    return Piece(added.text, _ADDED_SCORE, kind)


def _words(settings: TextSettings) -> dict[int, tuple[str, bool]]:
    """Text of each added token, and whether it is special."""
    tokens = settings.added_tokens.items()
    return {id: (token.text, token.special) for id, token in tokens}
