"""The tokenizer of a GGUF file, if it is a SentencePiece model, from and to ours.

llama.cpp stores the pieces with their scores and types, in SentencePiece's numbers. The
rest of a model is the same for all tokenizers of Llama 1, Llama 2 and Code Llama.
"""

import numpy as np

from llama_jax.conversion.config_fields import SIZE_LIMIT, short_repr
from llama_jax.conversion.gguf_header import (
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    Header,
    MetadataValue,
)
from llama_jax.errors import ConfigError, TokenizerError
from llama_jax.text.sentencepiece_codec import SentencePieces
from llama_jax.text.sentencepiece_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Piece,
    model_of_pieces,
    pieces_of_model,
)
from llama_jax.text.settings import AddedToken, TextSettings
from llama_jax.text.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_FIX = "name the file of its tokenizer with --tokenizer FILE (tokenizer=)"
# Key of each special id, and its default.
_SPECIAL = {
    "bos": ("bos_token_id", 1),
    "eos": ("eos_token_id", 2),
    "unk": ("unknown_token_id", 0),
}
_PAD = "padding_token_id"
# Keys of the ids of infilling models.
_INFILLING = {
    "prefix": "fim_pre_token_id",
    "suffix": "fim_suf_token_id",
    "middle": "fim_mid_token_id",
    "end": "eot_token_id",
}
_ADDED_SCORE = -1000.0  # of added tokens, as in llama.cpp's converter


def read_tokenizer(header: Header) -> Tokenizer:
    """Return the tokenizer in a file.

    Pieces at the end that are not normal text were added to the SentencePiece model
    later: they become added tokens, which no text is encoded to.

    Raises:
      TokenizerError: there is none, it is of another kind, or it is damaged.
    """
    kind = header.value(f"{_PREFIX}model")
    if kind != "llama":
        problem = f"has a tokenizer of the unknown kind {short_repr(kind)}"
        if kind is None or kind == "no_vocab":
            problem = "has no tokenizer"
        elif kind == "gpt2":
            problem = "has a byte-level tokenizer without the rule that splits text"
        raise TokenizerError(f"{header.path}: {problem}; {_FIX}")
    pieces = _pieces(header)
    ids = {name: _id(header, key, id) for name, (key, id) in _SPECIAL.items()}
    added: dict[int, str] = {}
    while pieces and pieces[-1].kind in (CONTROL, USER_DEFINED, UNUSED):
        if len(pieces) - 1 <= max(ids.values()):
            break
        piece = pieces.pop()
        if piece.kind != UNUSED:
            added[len(pieces)] = piece.text
    model = model_of_pieces(
        pieces,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unk"],
        add_dummy_prefix=header.value(f"{_PREFIX}add_space_prefix") is not False,
    )
    try:
        tokens = {id: AddedToken(name) for id, name in sorted(added.items())}
        tokenizer = Tokenizer(model, settings=TextSettings(added_tokens=tokens))
    except TokenizerError as error:
        raise TokenizerError(f"{header.path}: {error}; {_FIX}") from error
    for name, id in ids.items():
        if (actual := getattr(tokenizer, f"{name}_id")) != id:
            raise TokenizerError(
                f"{header.path}: its {name} token is {id}, but a SentencePiece model "
                f"of these pieces has {actual}; {_FIX}"
            )
    return tokenizer


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int
) -> dict[str, MetadataValue]:
    """Return the metadata of a tokenizer.

    Ids beyond its pieces become pieces that no text is encoded to: llama.cpp needs one
    for each row of the embedding.

    Args:
      tokenizer: of the model, if any.
      vocab_size: of the model.

    Raises:
      ConfigError: it is not a SentencePiece model, or one with rules that llama.cpp
        does not implement.
      TokenizerError: it has more pieces than the model has ids.
    """
    if tokenizer is None:
        return {f"{_PREFIX}model": MetadataValue(STRING, "no_vocab")}
    add_space_prefix = _adds_space_prefix(tokenizer)
    pieces = pieces_of_model(tokenizer.model_proto)
    tokenizer.check_fits(vocab_size)
    del pieces[vocab_size:]
    for id in range(len(pieces), vocab_size):
        name = tokenizer.added_tokens.get(id)
        kind = UNUSED if name is None else CONTROL
        pieces.append(Piece(name or f"[PAD{id}]", _ADDED_SCORE, kind))
    metadata = {
        "model": MetadataValue(STRING, "llama"),
        "pre": MetadataValue(STRING, "default"),
        "tokens": MetadataValue(STRING, [piece.text for piece in pieces]),
        "scores": MetadataValue(FLOAT32, [piece.score for piece in pieces]),
        "token_type": MetadataValue(INT32, [piece.kind for piece in pieces]),
        "add_space_prefix": MetadataValue(BOOL, add_space_prefix),
        "add_bos_token": MetadataValue(BOOL, True),
        "add_eos_token": MetadataValue(BOOL, False),
    }
    special = {key: getattr(tokenizer, f"{n}_id") for n, (key, _) in _SPECIAL.items()}
    special[_PAD] = tokenizer.pad_id
    if tokenizer.infilling is not None:
        ids = tokenizer.infilling._asdict()
        special |= {key: ids[name] for name, key in _INFILLING.items()}
    metadata |= {
        key: MetadataValue(UINT32, id) for key, id in special.items() if id >= 0
    }
    return {_PREFIX + key: value for key, value in metadata.items()}


def _pieces(header: Header) -> list[Piece]:
    texts, scores, kinds = (
        header.value(_PREFIX + name) for name in ("tokens", "scores", "token_type")
    )
    if not (
        isinstance(texts, list)
        and isinstance(scores, np.ndarray)
        and isinstance(kinds, np.ndarray)
        and len(texts) == len(scores) == len(kinds)
        and scores.dtype.kind == "f"
        and np.isfinite(scores).all()
        and kinds.dtype.kind in "iu"
        and ((kinds >= NORMAL) & (kinds <= BYTE)).all()
    ):
        raise TokenizerError(
            f"{header.path}: its tokens, scores and token types are damaged or of "
            f"different lengths; {_FIX}"
        )
    return [
        Piece(text, float(score), int(kind))
        for text, score, kind in zip(texts, scores, kinds, strict=True)
    ]


def _id(header: Header, key: str, default: int) -> int:
    value = header.value(_PREFIX + key)
    if value is None:
        return default
    if type(value) is not int or not 0 <= value < SIZE_LIMIT:
        raise TokenizerError(
            f"{header.path}: {_PREFIX}{key} is {short_repr(value)}, which is not a "
            f"token id; {_FIX}"
        )
    return value


def _adds_space_prefix(tokenizer: Tokenizer) -> bool:
    """Return whether text gets a space in front; refuses unsupported normalization."""
    if not tokenizer.has_pieces:
        raise ConfigError(
            "only SentencePiece tokenizers (Llama 1 and 2, Code Llama) can be written "
            "to a GGUF file; convert the Hugging Face folder with llama.cpp's converter"
        )
    pieces = SentencePieces(tokenizer.model_proto)
    with_space, without = "▁ﬁ▁▁X▁", "ﬁ▁▁X▁"
    normalized = pieces.sp.normalize("ﬁ  X ")
    if normalized not in (with_space, without):
        raise ConfigError(
            "the tokenizer normalizes text (NFKC, or repeated spaces), which a GGUF "
            "file of a Llama cannot store; is it another model's tokenizer?"
        )
    return bool(normalized == with_space)
