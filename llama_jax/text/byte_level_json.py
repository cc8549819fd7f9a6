"""The `tokenizer.json` of byte-level tokenizers: its parts, and files made of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.text.settings import AddedToken

GPT2_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
"""How GPT-2 splits a text before its bytes are merged."""

DIGIT_PATTERN = r"\p{N}"
"""Every digit is split off (StarCoder, SmolLM)."""


def byte_characters() -> list[str]:
    """The character that represents each byte in a byte-level vocabulary.

    Bytes that are printable in Latin-1 are represented by themselves, the others in
    order by the characters from U+0100 on (GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]


def steps(spec: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a `tokenizer.json`: a sequence, one step or none."""
    step = spec.get(part)
    for key in ("pretokenizers", "decoders", "processors"):
        if isinstance(step, dict) and key in step:
            step = step[key]
    all_steps = step if isinstance(step, list) else [step]
    return [step for step in all_steps if isinstance(step, dict)]


def split_patterns(spec: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions that split a text, one after another.

    Args:
      spec: the parsed file.

    Returns:
      The expressions, whose matches and the text between them are split; None if the
      pre-tokenizer does anything else.
    """
    *splits, last = steps(spec, "pre_tokenizer") or [{}]
    patterns = []
    for step in splits:
        pattern = step.get("pattern")
        match step.get("type"):
            case "Digits" if step.get("individual_digits"):
                patterns.append(DIGIT_PATTERN)
            case "Split" if (
                isinstance(pattern, dict)
                and step.get("behavior") == "Isolated"
                and not step.get("invert")
            ):
                text = str(pattern.get("String", ""))
                patterns.append(str(pattern.get("Regex", re.escape(text))))
            case _:
                return None
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    return (*patterns, *[GPT2_PATTERN] * bool(last.get("use_regex", True)))


def merge_pairs(merges: Iterable[str | Sequence[str]]) -> list[tuple[str, str]]:
    """The merges of a model, which files list as pairs or joined by a space.

    Raises:
      ValueError: a merge is not a pair.
    """
    pairs = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def make_byte_level_json(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    added: Mapping[int, AddedToken],
    *,
    patterns: Sequence[str],
    ignore_merges: bool,
) -> dict[str, Any]:
    """Create a `tokenizer.json`.

    Args:
      vocab: id of each piece, spelled in `byte_characters`.
      merges: of the pieces, first to last.
      added: tokens that are not made by merges.
      patterns: see `split_patterns`.
      ignore_merges: whether a word that is a piece is not merged.
    """
    splits = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in patterns
    ]
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    to_bytes["use_regex"] = False
    # `tokenizers` numbers added tokens after the vocabulary if it does not have them.
    last = max(vocab.values(), default=-1)
    within = {token.text: id for id, token in added.items() if id <= last}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token.text, **_flags(token)}
            for id, token in sorted(added.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, to_bytes]},
        "post_processor": None,
        "decoder": to_bytes | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": dict(
                sorted({**vocab, **within}.items(), key=lambda item: item[1])
            ),
            "merges": [list(pair) for pair in merges],
        },
    }


def merges_of_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges by which a model does what tiktoken does with pieces of these ranks.

    tiktoken joins any two pieces that form a piece, of the lowest rank first.
    """
    pairs = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            left, right = ranks.get(piece[:cut]), ranks.get(piece[cut:])
            if left is not None and right is not None:
                pairs.append((rank, left, right, piece[:cut], piece[cut:]))
    return [pair[3:] for pair in sorted(pairs)]


def _flags(token: AddedToken) -> dict[str, bool]:
    return {name: flag for name, flag in token._asdict().items() if name != "text"}
