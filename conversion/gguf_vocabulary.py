"""The tokens in the metadata of a GGUF file, whatever kind of tokenizer they belong to.

A token has a text, and a type by SentencePiece's numbers: control tokens are special,
user-defined ones are words of a text.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llama_jax.conversion.config_fields import short_repr
from llama_jax.conversion.gguf_header import Header
from llama_jax.errors import TokenizerError
from llama_jax.text.sentencepiece_proto import BYTE, CONTROL, NORMAL, USER_DEFINED
from llama_jax.text.settings import AddedToken

TOKENIZER = "tokenizer.ggml."
"""Prefix of the keys of a tokenizer."""
OTHER_TOKENIZER = "name the file of its tokenizer with --tokenizer FILE (tokenizer=)"
"""What to do about a tokenizer that is not supported."""
SPECIAL_IDS: Mapping[str, str] = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
}
"""Key of each special id, without the prefix."""


class Vocabulary(NamedTuple):
    """All tokens: their texts, and the numbers of their types."""

    texts: list[str]
    kinds: list[int]

    def ids(self, *kinds: int) -> list[int]:
        """The ids of tokens of some types."""
        return [id for id, kind in enumerate(self.kinds) if kind in kinds]

    def added_tokens(self, first: int) -> dict[int, AddedToken]:
        """The special tokens and words from an id on."""
        return {
            id: AddedToken(self.texts[id], special=self.kinds[id] == CONTROL)
            for id in self.ids(CONTROL, USER_DEFINED)
            if id >= first
        }


def read_vocabulary(header: Header) -> Vocabulary:
    """Read the tokens; without types, all are normal.

    Raises:
      TokenizerError: they are damaged.
    """
    texts, kinds = (header.value(TOKENIZER + key) for key in ("tokens", "token_type"))
    if kinds is None and isinstance(texts, list):
        kinds = np.full(len(texts), NORMAL)
    if not (
        isinstance(texts, list)
        and isinstance(kinds, np.ndarray)
        and len(texts) == len(kinds)
        and kinds.dtype.kind in "iu"
        and ((kinds >= NORMAL) & (kinds <= BYTE)).all()
    ):
        raise damaged_tokenizer(header)
    return Vocabulary(texts, kinds.tolist())


def damaged_tokenizer(header: Header) -> TokenizerError:
    """Return the error for tokens that do not fit together."""
    return TokenizerError(
        f"{header.path}: its tokens, scores, merges and token types are damaged or of "
        f"different lengths; {OTHER_TOKENIZER}"
    )


def read_text(header: Header, key: str) -> str | None:
    """Read a text; None if the key is absent.

    Raises:
      TokenizerError: it is something else.
    """
    value = header.value(key)
    if value is not None and not isinstance(value, str):
        raise TokenizerError(
            f"{header.path}: {key} is {short_repr(value)}; it must be a text; "
            f"{OTHER_TOKENIZER}"
        )
    return value


def token_id(header: Header, key: str, size: int) -> int | None:
    """Read the id of a token; None if the key is absent.

    Args:
      header: of the file.
      key: without the prefix.
      size: of the vocabulary.

    Raises:
      TokenizerError: it is not an id of the vocabulary.
    """
    value = header.value(TOKENIZER + key)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value < size:
        raise TokenizerError(
            f"{header.path}: {TOKENIZER}{key} is {short_repr(value)}, which is not a "
            f"token id; ids are 0 … {size - 1}; {OTHER_TOKENIZER}"
        )
    return value


def special_ids(header: Header, size: int, **defaults: int) -> dict[str, int]:
    """Read the special ids by their names in `SPECIAL_IDS`, -1 if there is none.

    Args:
      header: of the file.
      size: of the vocabulary.
      **defaults: ids by name, if a file does not say them.

    Raises:
      TokenizerError: one is not an id of the vocabulary.
    """
    ids = {name: token_id(header, key, size) for name, key in SPECIAL_IDS.items()}
    return {
        name: defaults.get(name, -1) if id is None else id for name, id in ids.items()
    }
