"""Added tokens in text: where they are, and how the text between them is encoded.

The rules are those of the package `tokenizers`. Text is split first at the tokens that
are not `normalized`. Of the parts, normalized, each is split at the others.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping

from llama_jax.text.codec import Codec
from llama_jax.text.settings import AddedToken

# Whitespace of regular expressions in Rust; `str.strip` removes more.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_WORD_CATEGORIES = ("Nd", "Nl", "Pc")
_JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
_SPACES = (" ", "▁")


class AddedWords:
    """Encodes text in which some tokens are one id.

    Args:
      codec: encodes the text between them.
      tokens: by id.
    """

    def __init__(self, codec: Codec, tokens: Mapping[int, AddedToken]) -> None:
        self._codec = codec
        raw = {t.text: (i, t) for i, t in tokens.items() if not t.normalized}
        normalized = {
            codec.normalize(t.text): (i, t) for i, t in tokens.items() if t.normalized
        }
        self._raw, self._normalized = _Splitter(raw), _Splitter(normalized)

    def encode(self, text: str, *, inner: bool) -> list[int]:
        """Encode a text; `inner` omits the space before its beginning."""
        ids: list[int] = []
        for i, (part, id) in enumerate(self._raw.split(text)):
            if id is not None:
                ids.append(id)
            else:
                ids += self._encode_part(part, first=i == 0, inner=inner)
        return ids

    def _encode_part(self, text: str, *, first: bool, inner: bool) -> list[int]:
        rule = self._codec.prefix_space
        normalized = self._codec.normalize(text)
        if rule == "always" and first and inner:
            normalized = normalized[1:]
        parts = list(self._normalized.split(normalized))
        # Normalizing has added the space of "always", which remains where it is.
        spaced = rule == "always" and len(parts) > 1
        if len(parts) == 1 and parts[0][1] is None:
            parts = [(text, None)]
        ids: list[int] = []
        for i, (part, id) in enumerate(parts):
            begins = first and i == 0
            prefixed = begins if rule.startswith("first") else not spaced
            prefixed &= not (begins and inner)
            if rule.endswith("_once") and part.startswith(_SPACES):
                prefixed = False
            ids += self._codec.encode(part, inner=not prefixed) if id is None else [id]
        return ids


class _Splitter:
    """Splits text at the leftmost longest of some tokens, by text."""

    def __init__(self, tokens: Mapping[str, tuple[int, AddedToken]]) -> None:
        self._tokens = tokens
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield the parts of a text, and the ids of those that are tokens."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern.pattern else ():
            id, token = self._tokens[match[0]]
            start, stop = match.span()
            if token.single_word and (
                _is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])
            ):
                continue
            if token.lstrip:
                start = max(end, len(text[:start].rstrip(_WHITESPACE)))
            if token.rstrip:
                stop = len(text) - len(text[stop:].lstrip(_WHITESPACE))
            if end < start:
                yield text[end:start], None
            yield text[start:stop], id
            end = stop
        if end < len(text):
            yield text[end:], None


def _is_word(character: str) -> bool:
    """Whether a character, or none, is of a word in Rust's regular expressions."""
    if not character:
        return False
    category = unicodedata.category(character)
    return (
        category[0] in "LM"
        or category in _WORD_CATEGORIES
        or character in _JOINERS
        or "Ⓐ" <= character <= "ⓩ"
    )
