"""The tokenizer within a GGUF file, where it is a SentencePiece model, as one of ours.

llama.cpp keeps the pieces with their scores and kinds, and numbers the kinds as
SentencePiece does. What else a model says is the same for all tokenizers of Llama 1 and
2 and Code Llama.
"""

import numpy as np

from llama_jax.conversion.gguf_header import (
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    Header,
    Value,
    shown,
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
from llama_jax.text.tokenizer import Tokenizer

_PREFIX = "tokenizer.ggml."
_FIX = "name the file of its tokenizer with --tokenizer FILE (tokenizer=)"
# Where a special id is found, and what it is where the file does not say.
_SPECIAL = {
    "bos": ("bos_token_id", 1),
    "eos": ("eos_token_id", 2),
    "unk": ("unknown_token_id", 0),
}
_PAD = "padding_token_id"
# What an infilling model has besides.
_INFILLING = {
    "prefix": "fim_pre_token_id",
    "suffix": "fim_suf_token_id",
    "middle": "fim_mid_token_id",
    "end": "eot_token_id",
}
_ADDED_SCORE = -1000.0  # llama.cpp's own converter has it for what was added


def read_tokenizer(header: Header) -> Tokenizer:
    """The tokenizer that a file holds.

    What stands behind the pieces and is no text was added to them later. It gets its
    name, but text never becomes it.

    Raises:
      TokenizerError: there is none, it is of another kind, or it is damaged.
    """
    kind = header.value(f"{_PREFIX}model")
    if kind != "llama":
        what = f"has a tokenizer of the unknown kind {shown(kind)}"
        if kind in (None, "no_vocab"):
            what = "has no tokenizer"
        elif kind == "gpt2":
            what = (
                "has a byte-level tokenizer, but not the rule that splits text for it"
            )
        raise TokenizerError(f"{header.path}: {what}; {_FIX}")
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
        tokenizer = Tokenizer(model, added_tokens=dict(sorted(added.items())))
    except TokenizerError as error:
        raise TokenizerError(f"{header.path}: {error}; {_FIX}") from error
    for name, id in ids.items():
        if (found := getattr(tokenizer, f"{name}_id")) != id:
            raise TokenizerError(
                f"{header.path}: its {name} token is {id}, but a SentencePiece model "
                f"of these pieces has {found}; {_FIX}"
            )
    return tokenizer


def tokenizer_metadata(
    tokenizer: Tokenizer | None, vocab_size: int
) -> dict[str, Value]:
    """What a file says about the tokenizer of a model with so many ids.

    Ids beyond the pieces become pieces that no text becomes: llama.cpp wants one for
    each row of the embedding.

    Raises:
      ConfigError: it is no SentencePiece model, or one that llama.cpp could not follow.
      TokenizerError: it has more pieces than the model has ids.
    """
    if tokenizer is None:
        return {f"{_PREFIX}model": Value(STRING, "no_vocab")}
    prefix = _add_space_prefix(tokenizer)
    pieces = pieces_of_model(tokenizer.model_proto)
    tokenizer.check_fits(vocab_size)
    del pieces[vocab_size:]
    for id in range(len(pieces), vocab_size):
        name = tokenizer.added_tokens.get(id)
        kind = UNUSED if name is None else CONTROL
        pieces.append(Piece(name or f"[PAD{id}]", _ADDED_SCORE, kind))
    found = {
        "model": Value(STRING, "llama"),
        "pre": Value(STRING, "default"),
        "tokens": Value(STRING, [piece.text for piece in pieces]),
        "scores": Value(FLOAT32, [piece.score for piece in pieces]),
        "token_type": Value(INT32, [piece.kind for piece in pieces]),
        "add_space_prefix": Value(BOOL, prefix),
        "add_bos_token": Value(BOOL, True),
        "add_eos_token": Value(BOOL, False),
    }
    special = {key: getattr(tokenizer, f"{n}_id") for n, (key, _) in _SPECIAL.items()}
    special[_PAD] = tokenizer.pad_id
    if tokenizer.infilling is not None:
        ids = tokenizer.infilling._asdict()
        special |= {key: ids[name] for name, key in _INFILLING.items()}
    found |= {key: Value(UINT32, id) for key, id in special.items() if id >= 0}
    return {_PREFIX + key: value for key, value in found.items()}


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
            f"{header.path}: its tokens, their scores and types are damaged or do not "
            f"belong together; {_FIX}"
        )
    return [
        Piece(text, float(score), int(kind))
        for text, score, kind in zip(texts, scores, kinds, strict=True)
    ]


def _id(header: Header, key: str, absent: int) -> int:
    value = header.value(_PREFIX + key)
    if value is None:
        return absent
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise TokenizerError(
            f"{header.path}: {_PREFIX}{key} is {shown(value)}, which is no token; "
            f"{_FIX}"
        )
    return value


def _add_space_prefix(tokenizer: Tokenizer) -> bool:
    """Whether a space is put before a text; refuses what llama.cpp cannot follow."""
    if not tokenizer.has_pieces:
        raise ConfigError(
            "only SentencePiece tokenizers (Llama 1 and 2, Code Llama) can be written "
            "into a GGUF file so far; convert the Hugging Face folder with llama.cpp's "
            "own converter"
        )
    pieces = SentencePieces(tokenizer.model_proto)
    spaced, plain = "▁ﬁ▁▁X▁", "ﬁ▁▁X▁"
    found = pieces.sp.normalize("ﬁ  X ")
    if found not in (spaced, plain):
        raise ConfigError(
            "its tokenizer normalizes text (NFKC, or fewer spaces), which a GGUF file "
            "of a Llama cannot say; is it another model's tokenizer?"
        )
    return bool(found == spaced)
