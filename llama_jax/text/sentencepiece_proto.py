"""SentencePiece models: read, and created from other files with the same pieces.

The protobuf code is our own because SentencePiece's generated module registers
`sentencepiece_model.proto` globally, as does the copy in transformers, and a process
can register only one.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import TokenizerError
from llama_jax.text.settings import AddedToken, added_token

# Field numbers and kinds are those of SentencePiece's sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_MAX_EQUAL_SCORES = 64  # Code Llama has 23 pieces of equal score, Llama 2 has 16


class Piece(NamedTuple):
    """One piece of a vocabulary; `text` has spaces as `▁` (U+2581)."""

    text: str
    score: float
    kind: int = NORMAL


def model_of_pieces(
    pieces: Sequence[Piece],
    *,
    unk_id: int = 0,
    bos_id: int = 1,
    eos_id: int = 2,
    pad_id: int = -1,
    add_dummy_prefix: bool = True,
) -> bytes:
    """Create a `tokenizer.model` like Llama's: BPE, byte fallback, no normalization.

    Args:
      pieces: in the order of their ids.
      unk_id: of unknown text.
      bos_id: of the begin of sequence.
      eos_id: of the end of sequence.
      pad_id: of padding, -1 for none.
      add_dummy_prefix: whether a space is added to the beginning of a text.
    """
    # 3 model_type (2: BPE), 4 vocab_size, 35 byte_fallback, 40-43 special ids.
    trainer = _number(3, 2) + _number(4, len(pieces)) + _number(35, 1)
    special = enumerate((unk_id, bos_id, eos_id, pad_id), start=40)
    trainer += b"".join(_number(field, id) for field, id in special)
    # 1 name, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces.
    normalizer = _field(1, b"identity") + _number(3, add_dummy_prefix)
    normalizer += _number(4, 0) + _number(5, 1)
    fields = [_field(1, _encoded(piece)) for piece in pieces]
    return b"".join((*fields, _field(2, trainer), _field(3, normalizer)))


def pieces_of_model(model_proto: bytes) -> list[Piece]:
    """Read the pieces of a `tokenizer.model`, in the order of their ids.

    Args:
      model_proto: a valid model, which SentencePiece has loaded before.
    """
    pieces = []
    for field, content in _fields(model_proto):
        if field == 1:
            fields = dict(_fields(content))
            (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
            pieces.append(Piece(fields[1].decode(), score, fields.get(3, NORMAL)))
    return pieces


def from_json(spec: Mapping[str, Any]) -> tuple[bytes, dict[int, AddedToken]]:
    """Convert the `tokenizer.json` of a Llama 1 or 2 to a SentencePiece model.

    Its merges are in the order of the pieces' scores. They are checked to be exactly
    those that the scores imply, so that both tokenizers encode text alike.

    Args:
      spec: the parsed file.

    Returns:
      The model, and the added tokens beyond its pieces.

    Raises:
      TokenizerError: the file is damaged, or is not equivalent to such a model.
    """
    try:
        pieces = len(spec["model"]["vocab"])
        added = {int(t["id"]): added_token(t) for t in spec["added_tokens"]}
        return _from_json(spec), {i: t for i, t in added.items() if i >= pieces}
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise TokenizerError(
            f"tokenizer: a tokenizer.json with byte fallback that is damaged or not "
            f"like Llama's ({error}); use its tokenizer.model, if there is one"
        ) from error


def _from_json(spec: Mapping[str, Any]) -> bytes:
    model = spec["model"]
    spaces = (spec.get("normalizer"), spec.get("pre_tokenizer"))
    if not (_prepends(spaces[0]) and spaces[1] is None) and not (
        spaces[0] is None and _is_metaspace(spaces[1])
    ):
        raise ValueError("its handling of spaces differs")
    for key in ("dropout", "ignore_merges", "continuing_subword_prefix",
                "end_of_word_suffix"):  # fmt: skip
        if model.get(key):
            raise ValueError(f"its model has {key} {model[key]!r}")
    vocab: dict[str, int] = model["vocab"]
    texts = sorted(vocab, key=vocab.__getitem__)
    if [vocab[text] for text in texts] != list(range(len(texts))):
        raise ValueError("an id has no piece, or two")
    control = {t["content"] for t in spec["added_tokens"] if t["special"]}
    control |= {"<s>", "</s>"}
    kinds = dict.fromkeys(texts, NORMAL) | dict.fromkeys(control, CONTROL)
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {"<unk>": UNKNOWN}
    required = {"<s>", "</s>", *(text for text in kinds if kinds[text] != CONTROL)}
    if missing := required - vocab.keys():
        raise ValueError(f"it has no piece {min(missing)}")
    scores = _scores(model["merges"], kinds)
    return model_of_pieces(
        [Piece(text, scores.get(text, 0.0), kinds[text]) for text in texts],
        unk_id=vocab["<unk>"],
        bos_id=vocab["<s>"],
        eos_id=vocab["</s>"],
    )


def _scores(merges: list[Any], kinds: Mapping[str, int]) -> dict[str, float]:
    """The score of each merged piece: lower for later merges."""
    normal = {text for text, kind in kinds.items() if kind == NORMAL}
    ranks: dict[str, list[int]] = {}
    pairs = set()
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if kinds[left + right] == NORMAL:  # text never encodes to a special token
            ranks.setdefault(left + right, []).append(rank)
            pairs.add((left, right))
    implied = {
        (text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    }
    if pairs != implied:
        raise ValueError(
            f"its merges lack {len(implied - pairs)} pairs that form a piece, "
            f"and have {len(pairs - implied)} others"
        )
    scores: dict[str, float] = {}
    first, last, equal = 0, -1, 0
    for text, of_text in ranks.items():
        # The merges of pieces with equal scores, such as Llama's runs of spaces, are
        # interleaved.
        if of_text[0] > last:
            first, equal = of_text[0], 0
        last, equal = max(last, of_text[-1]), equal + 1
        if equal > _MAX_EQUAL_SCORES:
            raise ValueError("its merges are not in the order of scores")
        scores[text] = -float(first)
    return scores


def _prepends(normalizer: Any) -> bool:
    """Whether a normalizer prepends `▁` to a text and replaces spaces with it."""
    return normalizer is not None and normalizer.get("normalizers") == [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]


def _is_metaspace(step: Any) -> bool:
    """Whether a pre-tokenizer does the same, as in newer files."""
    step = dict(step or {})
    if step.pop("prepend_scheme", None) not in ("first", "always"):
        return False
    return step == {"type": "Metaspace", "replacement": "▁", "split": False}


def _encoded(piece: Piece) -> bytes:
    score = b"\x15" + struct.pack("<f", piece.score)
    return _field(1, piece.text.encode()) + score + _number(3, piece.kind)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of each field of a message, an integer or bytes."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, at = _read_varint(data, at)
        if tag & 7 == 0:  # a varint is its own value
            yield tag >> 3, size
            continue
        yield tag >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers in two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
