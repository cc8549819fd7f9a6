"""Code Llama's infilling transform: a document cut in three, the middle told last."""

from typing import NamedTuple

from llama_jax.data.order import draws
from llama_jax.errors import DataError
from llama_jax.text.prompt_formats import infilling_prompt
from llama_jax.text.tokenizer import Tokenizer

RATE = 0.9
"""How many of the documents are transformed (Code Llama paper, section 2.3)."""


class Cut(NamedTuple):
    """A document in three parts, and in which order they are told."""

    prefix: str
    middle: str
    suffix: str
    suffix_first: bool


def cut(text: str, *key: int, rate: float = RATE) -> Cut | None:
    """How this document is transformed; None if it stays as it is.

    Both ends of the middle are drawn evenly from all places between characters, and
    half of the documents tell the suffix first.

    Args:
      text: the document.
      key: the same key gives the same cut.
      rate: how many of the documents are transformed.
    """
    told, order, *ends = draws(4, *key)
    if told >= rate:
        return None
    first, last = sorted(int(end * (len(text) + 1)) for end in ends)
    return Cut(text[:first], text[first:last], text[last:], order < 0.5)


def encode_cut(tokenizer: Tokenizer, parts: Cut) -> list[int]:
    """Ids of a document that was cut, to be learnt from the first to the last.

    Prefix first, the middle follows the very prompt of inference. Suffix first, prefix
    and middle are encoded as one text, so that no token is split where they meet.
    Either way the end-of-infilling token is the last.

    Raises:
      DataError: the tokenizer is not that of an infilling model.
    """
    pieces = tokenizer.infilling
    if pieces is None:
        raise DataError(
            "infilling: the tokenizer has no infilling pieces; use Code Llama's, or "
            "--format text"
        )
    prefix, middle, suffix, suffix_first = parts
    if suffix_first:
        told = infilling_prompt(tokenizer, prefix + middle, suffix, suffix_first=True)
    else:
        told = infilling_prompt(tokenizer, prefix, suffix)
        told += tokenizer.encode_infilling(middle)
    return [*told, pieces.end]
