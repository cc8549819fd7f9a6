"""Byte-level BPE: Llama 3's file from Meta, and any model's `tokenizer.json`.

Its pieces are byte strings, so it needs neither a leading space nor an unknown piece.
The algorithms are in the optional packages tiktoken and tokenizers.
"""

import base64
import binascii
import codecs
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from llama_jax.errors import TokenizerError
from llama_jax.text.byte_level_json import (
    byte_characters,
    make_byte_level_json,
    merge_pairs,
    merges_of_ranks,
    steps,
)
from llama_jax.text.settings import AddedToken, PrefixSpace, listed_tokens

# Meta's Llama 3 code adds this pre-tokenization pattern, and 256 special tokens after
# the pieces, to what is in its file.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PIECES = 128_000
_NUM_SPECIAL = 256
_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
_PAD = "<|finetune_right_pad_id|>"
_NAMED = (
    _BEGIN, _END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    _PAD, "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
LLAMA3_SPECIAL = (
    *_NAMED,
    *(f"<|reserved_special_token_{i + 2}|>" for i in range(_NUM_SPECIAL - len(_NAMED))),
)
"""Llama 3's special tokens in the order of their ids; some are unused in 3.0."""

# Meta's code splits longer runs of spaces or non-spaces: tiktoken's regular expression
# overflows its stack on several hundred thousand spaces.
_LONGEST_RUN = 25_000
_LONG_RUN = re.compile(rf"\s{{{_LONGEST_RUN + 1},}}|\S{{{_LONGEST_RUN + 1},}}")


class ByteLevel:
    """A byte-level BPE as a `Codec`.

    Args:
      encode: text to ids, without special tokens.
      pieces: the bytes of every id that text can encode to.
      added: the other ids; special ones decode to nothing.
      file_name: of the tokenizer in a checkpoint.

    Begin and end of text and the padding are Llama 3's, if there are tokens of these
    names, else -1.

    Raises:
      TokenizerError: a byte has no piece.
    """

    unk_id = -1
    prefix_space: PrefixSpace = "never"
    tokens: Mapping[int, AddedToken] = MappingProxyType({})

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        pieces: Mapping[int, bytes],
        added: Mapping[int, AddedToken],
        file_name: str,
    ) -> None:
        self._encode = encode
        self._pieces = pieces
        self._added = added
        self._ids = {token.text: id for id, token in added.items()}
        self._ids_of_bytes = {piece: id for id, piece in self._pieces.items()}
        lacking = [b for b in range(256) if bytes([b]) not in self._ids_of_bytes]
        if lacking:
            raise TokenizerError(
                f"tokenizer: has no piece for the byte 0x{lacking[0]:02X}, so not all "
                "text can be encoded; the file is damaged or of another kind"
            )
        self.file_name = file_name
        special = (self._ids.get(name, -1) for name in (_BEGIN, _END, _PAD))
        self.bos_id, self.eos_id, self.pad_id = special
        self.vocab_size = max(*self._pieces, *added) + 1
        words = {i: t.text.encode() for i, t in added.items() if not t.special}
        self._bytes = {**pieces, **words}
        known = pieces.keys() | added.keys()
        if self.vocab_size > 2 * len(known):
            raise TokenizerError(
                f"tokenizer: has ids up to {self.vocab_size - 1}, but names only "
                f"{len(known)}; download it again"
            )
        self.holes = tuple(sorted(set(range(self.vocab_size)) - known))

    def normalize(self, text: str) -> str:
        """The text in which normalized added tokens are searched: as it is."""
        return text

    def encode(self, text: str, *, inner: bool) -> list[int]:
        """Encode a text; `inner` changes nothing."""
        ids, start = [], 0
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                ids += self._encode(text[start:cut])
                start = cut
        return ids + self._encode(text[start:])

    def decode(self, ids: list[int], *, inner: bool) -> str:
        """Decode the joined bytes of ids."""
        return b"".join(self._bytes.get(id, b"") for id in ids).decode(errors="replace")

    def stream(self, added: Mapping[int, str], *, inner: bool) -> "ByteStream":
        """Create a streaming decoder."""
        names = {id: name.encode() for id, name in added.items()}
        return ByteStream(self._bytes | names if names else self._bytes)

    def piece(self, id: int) -> str:
        """The name of a special token, or the text of a piece."""
        if id in self._added:
            return self._added[id].text
        return self._pieces.get(id, b"").decode(errors="backslashreplace")

    def piece_id(self, piece: str) -> int | None:
        """The id of the special token with this name, or the piece with this text."""
        id = self._ids.get(piece)
        return self._ids_of_bytes.get(piece.encode()) if id is None else id

    def can_encode(self, id: int) -> bool:
        """Whether encoding some text can produce this id."""
        return id in self._pieces or (id in self._added and not self._added[id].special)


class ByteStream:
    """Streaming decoder of byte-level ids.

    Args:
      pieces: the bytes of each id; ids without bytes decode to nothing.
    """

    def __init__(self, pieces: Mapping[int, bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Append ids and return the text that they complete, "" if none."""
        return self._decoder.decode(b"".join(self._pieces.get(id, b"") for id in ids))

    def flush(self) -> str:
        """Return the rest: U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", final=True)


def is_ranks(contents: bytes) -> bool:
    """Whether a file begins like tiktoken's: a base64 piece, a space, its rank."""
    line = contents[:1000].partition(b"\n")[0]
    return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+\r?", line) is not None


def from_ranks(contents: bytes) -> tuple[ByteLevel, dict[int, AddedToken]]:
    """Read Llama 3's tokenizer from Meta's file.

    Returns:
      The tokenizer, and its added tokens.

    Raises:
      TokenizerError: the file is damaged or of another model, or tiktoken is not
        installed.
    """
    ranks = _read_ranks(contents)
    special = enumerate(LLAMA3_SPECIAL, start=len(ranks))
    added = {id: AddedToken(name) for id, name in special}
    pieces = {rank: piece for piece, rank in ranks.items()}
    encoding = _package("tiktoken").Encoding(
        "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    codec = ByteLevel(encoding.encode_ordinary, pieces, added, "tokenizer.model")
    return codec, added


def _read_ranks(contents: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(contents.splitlines()):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
            if int(rank) != number or len(ranks) != number + 1:
                raise ValueError
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"tokenizer: line {number + 1} is not the piece of rank {number}; "
                "download the file again"
            ) from error
    if len(ranks) != LLAMA3_PIECES:
        raise TokenizerError(
            f"tokenizer: has {len(ranks)} pieces, but Llama 3's has {LLAMA3_PIECES}; "
            "the file is incomplete, or of another family of models"
        )
    return ranks


def from_json(spec: Mapping[str, Any]) -> tuple[ByteLevel, dict[int, AddedToken]]:
    """Read a byte-level BPE from a `tokenizer.json`.

    Args:
      spec: the parsed file.

    Returns:
      The tokenizer, and its added tokens.

    Raises:
      TokenizerError: the file is damaged or of another kind, or the package tokenizers
        is not installed.
    """
    model = spec["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise TokenizerError(
                f"tokenizer: its model has {key} {model[key]!r}, which is not "
                "supported; use a Llama model's tokenizer"
            )
    if any(step.get("add_prefix_space") for step in steps(spec, "pre_tokenizer")):
        raise TokenizerError(
            "tokenizer: adds a space to the beginning of every text "
            "(add_prefix_space), which is not supported for byte-level tokenizers; use "
            "a Llama model's tokenizer"
        )
    package = _package("tokenizers")
    try:
        added = listed_tokens(spec.get("added_tokens") or ())
        # Text must not encode to special tokens: they are no part of the model.
        special = {token.text for token in added.values() if token.special}
        vocab = {text: id for text, id in model["vocab"].items() if text not in special}
        merges = [
            pair
            for pair in merge_pairs(model["merges"])
            if special.isdisjoint((*pair, "".join(pair)))
        ]
        # Without a post-processor, which adds tokens around a text.
        empty = {"type": "BPE", "vocab": {}, "merges": []}
        parts = {key: spec.get(key) for key in ("normalizer", "pre_tokenizer")}
        plain = package.Tokenizer.from_str(json.dumps({"model": empty, **parts}))
        plain.model = package.models.BPE(
            vocab, merges, ignore_merges=bool(model.get("ignore_merges"))
        )
        value = {character: byte for byte, character in enumerate(byte_characters())}
        pieces = {
            id: bytes(value[character] for character in piece)
            for piece, id in vocab.items()
            if id not in added
        }
    except Exception as error:  # tokenizers raises nothing narrower
        raise TokenizerError(
            f"tokenizer: not a byte-level tokenizer.json, or a damaged one ({error}); "
            "download it again"
        ) from error

    def encode(text: str) -> list[int]:
        ids: list[int] = plain.encode(text, add_special_tokens=False).ids
        return ids

    return ByteLevel(encode, pieces, added, "tokenizer.json"), added


def json_of_ranks(contents: bytes) -> dict[str, Any]:
    """Convert Meta's file to a `tokenizer.json`.

    Raises:
      TokenizerError: as in `from_ranks`.
    """
    ranks = _read_ranks(contents)
    characters = byte_characters()

    def spell(piece: bytes) -> str:
        return "".join(characters[byte] for byte in piece)

    special = enumerate(LLAMA3_SPECIAL, start=len(ranks))
    return make_byte_level_json(
        {spell(piece): rank for piece, rank in ranks.items()},
        [(spell(left), spell(right)) for left, right in merges_of_ranks(ranks)],
        {id: AddedToken(name) for id, name in special},
        patterns=[LLAMA3_PATTERN],
        ignore_merges=True,
    )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TokenizerError(
            f"tokenizer: this file needs the package {name}; run "
            'pip install "llama-jax[llama3]"'
        ) from error
