"""SentencePiece models as the `tokenizer.json` of Hugging Face's `tokenizers`."""

from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.text.sentencepiece_proto import CONTROL, NORMAL, UNKNOWN, Piece

_SPACE = "▁"


def make_tokenizer_json(
    pieces: Sequence[Piece], added: Mapping[int, str], *, unk: str, bos: str
) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that gives the same ids.

    Args:
      pieces: of a BPE model with byte fallback, in the order of ids.
      added: names of ids beyond the pieces.
      unk: text of the piece for unknown characters.
      bos: text of the piece that every encoded text begins with.
    """
    ids = {piece.text: id for id, piece in enumerate(pieces)}
    special = {i: p.text for i, p in enumerate(pieces) if p.kind in (CONTROL, UNKNOWN)}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for id, name in {**special, **added}.items()
        ],
        "normalizer": _sequence(
            "normalizers",
            {"type": "Prepend", "prepend": _SPACE},
            _replace(" ", _SPACE),
        ),
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, texts[0]],
            "pair": [
                begin,
                texts[0],
                {"SpecialToken": {"id": bos, "type_id": 1}},
                texts[1],
            ],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
        },
        "decoder": _sequence(
            "decoders",
            _replace(_SPACE, " "),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": _merges(pieces),
        },
    }


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


def _sequence(name: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: list(steps)}


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}
