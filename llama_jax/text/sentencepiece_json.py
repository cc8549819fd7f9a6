"""The `tokenizer.json` of SentencePiece models: what it says in their terms."""

import re
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from llama_jax.errors import TokenizerError
from llama_jax.text.byte_level_json import merge_pairs, steps
from llama_jax.text.sentencepiece_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    model_of_pieces,
)
from llama_jax.text.settings import AddedToken, PrefixSpace, listed_tokens

_MAX_EQUAL_SCORES = 64  # Code Llama has 23 pieces of equal score, Llama 2 has 16


class FromJson(NamedTuple):
    """A `tokenizer.json` as a SentencePiece model, and what such a model cannot say.

    Attributes:
      model_proto: the model.
      added_tokens: of the file, by id; control pieces are among them.
      prefix_space: where a space is added.
    """

    model_proto: bytes
    added_tokens: dict[int, AddedToken]
    prefix_space: PrefixSpace


def from_json(spec: Mapping[str, Any]) -> FromJson:
    """Convert the `tokenizer.json` of a Llama 1 or 2 to a SentencePiece model.

    Its merges are in the order of the pieces' scores. They are checked to be exactly
    those that the scores imply, so that both tokenizers encode text alike.

    Args:
      spec: the parsed file.

    Raises:
      TokenizerError: the file is damaged, or is not equivalent to such a model.
    """
    try:
        return _from_json(spec)
    except (KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise TokenizerError(
            f"tokenizer: a tokenizer.json with byte fallback that is damaged or not "
            f"like Llama's ({error}); use its tokenizer.model, if there is one"
        ) from error


def _from_json(spec: Mapping[str, Any]) -> FromJson:
    model = spec["model"]
    prefix_space = prefix_space_of(spec)
    if prefix_space is None:
        raise ValueError("its handling of spaces differs")
    user_defined = split_words(spec)
    keys = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    for key in keys + ["ignore_merges"] * (not user_defined):
        if model.get(key):
            raise ValueError(f"its model has {key} {model[key]!r}")
    vocab: dict[str, int] = model["vocab"]
    texts = sorted(vocab, key=vocab.__getitem__)
    if [vocab[text] for text in texts] != list(range(len(texts))):
        raise ValueError("an id has no piece, or two")
    added = listed_tokens(spec["added_tokens"])
    words = {token.text for token in added.values() if not token.special}
    control = {token.text for token in added.values() if token.special}
    control |= {"<s>", "</s>"}
    kinds = dict.fromkeys(texts, NORMAL) | dict.fromkeys(control, CONTROL)
    # Words that merges form or use remain pieces; they are searched in text first.
    merges = merge_pairs(model["merges"])
    merged = {text for pair in merges for text in (*pair, "".join(pair))}
    words = (words & vocab.keys()) - merged
    kinds |= dict.fromkeys(words.union(user_defined), USER_DEFINED)
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(256)} | {"<unk>": UNKNOWN}
    required = {"<s>", "</s>", *(text for text in kinds if kinds[text] != CONTROL)}
    if missing := required - vocab.keys():
        raise ValueError(f"it has no piece {min(missing)}")
    scores = _scores(merges, kinds)
    pieces = [Piece(text, scores.get(text, 0.0), kinds[text]) for text in texts]
    model_proto = model_of_pieces(
        pieces,
        unk_id=vocab["<unk>"],
        bos_id=vocab["<s>"],
        eos_id=vocab["</s>"],
        add_dummy_prefix=prefix_space != "never",
    )
    return FromJson(model_proto, added, prefix_space)


def _scores(
    merges: Sequence[tuple[str, str]], kinds: Mapping[str, int]
) -> dict[str, float]:
    """The score of each merged piece: lower for later merges."""
    normal = {text for text, kind in kinds.items() if kind == NORMAL}
    ranks: dict[str, list[int]] = {}
    pairs = set()
    for rank, (left, right) in enumerate(merges):
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


_SPACES_AS_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
_SPLIT = {"type": "Split", "pattern": None, "behavior": "Isolated", "invert": False}


def text_rules(
    prefix_space: PrefixSpace, user_defined: Collection[str] = ()
) -> dict[str, Any]:
    """The `normalizer` and `pre_tokenizer` of a `tokenizer.json`.

    A normalizer is applied to each text between added tokens. Metaspace knows where
    the whole text begins, but adds no space to text that begins with its mark, which
    then must be another character than the normalizer's.

    Args:
      prefix_space: where a space is added.
      user_defined: pieces that are split off after that, so that no space is added
        after them as after added tokens. The model needs `ignore_merges`.
    """
    normalizer: Any = None
    splits: list[dict[str, Any]] = []
    match prefix_space:
        case "always":
            normalizer = _sequence("normalizers", _PREPEND, _SPACES_AS_MARKS)
        case "never":
            normalizer = _sequence("normalizers", _SPACES_AS_MARKS)
        case "first":
            normalizer = _sequence("normalizers", _SPACES_AS_MARKS)
            splits = [_metaspace(" ", "first"), _metaspace("▁", "never")]
        case _:
            splits = [_metaspace("▁", prefix_space.removesuffix("_once"))]
    if user_defined:
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = {"Regex": "|".join(map(re.escape, longest_first))}
        splits.append(_SPLIT | {"pattern": pattern})
    pre_tokenizer = _sequence("pretokenizers", *splits) if len(splits) > 1 else None
    return {
        "normalizer": normalizer,
        "pre_tokenizer": splits[0] if len(splits) == 1 else pre_tokenizer,
    }


def split_words(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """The user-defined pieces of `text_rules`."""
    last = (steps(spec, "pre_tokenizer") or [{}])[-1]
    pattern = last.get("pattern")
    if not isinstance(pattern, dict) or {**last, "pattern": None} != _SPLIT:
        return ()
    words = re.findall(r"(?:\\.|[^\\|])+", str(pattern.get("Regex", "")), re.DOTALL)
    return tuple(re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL) for word in words)


def prefix_space_of(spec: Mapping[str, Any]) -> PrefixSpace | None:
    """The rule of spaces of a `tokenizer.json`, None if it is another one."""
    rules = {part: spec.get(part) for part in ("normalizer", "pre_tokenizer")}
    if rules["normalizer"] == _SPACES_AS_MARKS:
        rules["normalizer"] = _sequence("normalizers", _SPACES_AS_MARKS)
    if rules == {"normalizer": None, "pre_tokenizer": _metaspace("▁", "never")}:
        return "never"
    schemes: tuple[PrefixSpace, ...] = get_args(PrefixSpace)
    words = split_words(spec)
    return next((rule for rule in schemes if text_rules(rule, words) == rules), None)


def _metaspace(mark: str, scheme: str) -> dict[str, Any]:
    return {
        "type": "Metaspace",
        "replacement": mark,
        "prepend_scheme": scheme,
        "split": False,
    }


def _sequence(name: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", name: list(steps)}
