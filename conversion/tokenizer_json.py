"""Tokenizers as the `tokenizer.json` of Hugging Face's `tokenizers`."""

import json
from collections.abc import Sequence
from typing import Any

from llama_jax.errors import TokenizerError
from llama_jax.text.byte_level_bpe import is_ranks, json_of_ranks
from llama_jax.text.byte_level_json import steps
from llama_jax.text.sentencepiece_json import text_rules
from llama_jax.text.sentencepiece_proto import (
    NORMAL,
    USER_DEFINED,
    Piece,
    pieces_of_model,
)
from llama_jax.text.settings import AddedToken, filler
from llama_jax.text.tokenizer import Tokenizer

_SPACE = "▁"


def filled_tokens(tokenizer: Tokenizer) -> dict[int, AddedToken]:
    """Return all added tokens in the order of ids, with names for the gaps.

    Pieces that a SentencePiece model finds in text itself are not among them.
    """
    added = tokenizer.settings.added_tokens
    tokens = {i: t for i, t in tokenizer.tokens.items() if t.special or i in added}
    for id in range(tokenizer.vocab_size, max(tokens, default=-1)):
        tokens.setdefault(id, AddedToken(filler(id)))
    return dict(sorted(tokens.items()))


def make_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that gives the same ids.

    Raises:
      TokenizerError: `tokenizers` would give its added tokens other ids.
    """
    if tokenizer.has_pieces:
        spec = _of_pieces(tokenizer)
    elif is_ranks(tokenizer.contents):
        spec = json_of_ranks(tokenizer.contents)
    else:
        spec = json.loads(tokenizer.contents)
    vocab = spec["model"]["vocab"]
    tokens = filled_tokens(tokenizer)
    # Tokens that the model lacks are numbered by their position, after its pieces.
    numbered = [id for id, token in tokens.items() if token.text not in vocab]
    if numbered and numbered != list(range(len(vocab), numbered[-1] + 1)):
        tokens |= {
            id: AddedToken(filler(id))
            for id in range(len(vocab), numbered[-1])
            if id not in tokens and id not in vocab.values()
        }
        tokens = dict(sorted(tokens.items()))
        numbered = [id for id, token in tokens.items() if token.text not in vocab]
    if numbered != list(range(len(vocab), len(vocab) + len(numbered))):
        raise TokenizerError(
            "tokenizer: ids of its pieces have gaps, so tokenizer.json cannot give its "
            f"added tokens their ids (from {numbered[0]} on); choose another format"
        )
    spec["added_tokens"] = [
        {"id": id, "content": token.text} | flags_of(token)
        for id, token in tokens.items()
    ]
    spec["post_processor"] = _post_processor(spec, tokenizer)
    return spec


def flags_of(token: AddedToken) -> dict[str, bool]:
    """Return the flags of a token as files have them."""
    return {name: flag for name, flag in token._asdict().items() if name != "text"}


def _of_pieces(tokenizer: Tokenizer) -> dict[str, Any]:
    """A SentencePiece model: BPE with byte fallback."""
    pieces = pieces_of_model(tokenizer.model_proto)
    user_defined = [
        piece.text
        for id, piece in enumerate(pieces)
        if piece.kind == USER_DEFINED and id not in tokenizer.settings.added_tokens
    ]
    strips = tokenizer.prefix_space != "never"
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        **text_rules(tokenizer.prefix_space, user_defined),
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *[strip] * strips,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[tokenizer.unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": bool(user_defined),
            "vocab": {piece.text: id for id, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _post_processor(spec: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What puts begin and end of sequence around a text."""
    settings = tokenizer.settings
    around = {
        "bos": tokenizer.bos_id if settings.add_bos else -1,
        "eos": tokenizer.eos_id if settings.add_eos else -1,
    }
    names = {kind: tokenizer.piece(id) for kind, id in around.items() if id >= 0}

    def parts(sequence: str, type_id: int) -> list[dict[str, Any]]:
        text = {"Sequence": {"id": sequence, "type_id": type_id}}
        begin, end = (
            [{"SpecialToken": {"id": names[kind], "type_id": type_id}}]
            if kind in names
            else []
            for kind in around
        )
        return [*begin, text, *end]

    template = {
        "type": "TemplateProcessing",
        "single": parts("A", 0),
        "pair": [*parts("A", 0), *parts("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [around[kind]], "tokens": [name]}
            for kind, name in names.items()
        },
    }
    others = [
        step
        for step in steps(spec, "post_processor")
        if step.get("type") == "ByteLevel"
    ]
    if others:
        return {"type": "Sequence", "processors": [*others, template]}
    return template


def _merges(pieces: Sequence[Piece]) -> list[list[str]]:
    """Return every pair of pieces that joins to a piece, best scores first."""
    normal = {piece.text: id for id, piece in enumerate(pieces) if piece.kind == NORMAL}
    pairs = []
    for text, id in normal.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                pairs.append((-pieces[id].score, normal[left], normal[right]))
    return [[pieces[left].text, pieces[right].text] for _, left, right in sorted(pairs)]
