"""Code Llama's infilling transform: a document cut in three, the middle put last."""

from typing import NamedTuple

from llama_jax.data.order import draws
from llama_jax.errors import DataError
from llama_jax.text.prompt_formats import infilling_prompt
from llama_jax.text.tokenizer import Tokenizer

RATE = 0.9
"""Fraction of documents that are transformed (arXiv:2308.12950, 2.3)."""


class Cut(NamedTuple):
    """A document in three parts, and whether the suffix comes before the prefix."""

    prefix: str
    middle: str
    suffix: str
    suffix_first: bool


def cut(text: str, *key: int, rate: float = RATE) -> Cut | None:
    """Cut a document in three; return None if it is not transformed.

    Both ends of the middle are uniform over the positions between characters. Half of
    the documents have the suffix first.

    Args:
      text: the document.
      key: the same key gives the same cut.
      rate: fraction of documents that are transformed.
    """
    chance, order, *ends = draws(4, *key)
    if chance >= rate:
        return None
    first, last = sorted(int(end * (len(text) + 1)) for end in ends)
    return Cut(text[:first], text[first:last], text[last:], order < 0.5)


def encode_cut(tokenizer: Tokenizer, parts: Cut) -> list[int]:
    """Encode a document that was cut; all of it is learnt.

    With the prefix first, the middle follows the prompt of inference. With the suffix
    first, prefix and middle are encoded as one text, so that no token is split between
    them. The last id is the end-of-infilling token.

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
        ids = infilling_prompt(tokenizer, prefix + middle, suffix, suffix_first=True)
    else:
        ids = infilling_prompt(tokenizer, prefix, suffix)
        ids += tokenizer.encode_infilling(middle)
    return [*ids, pieces.end]
