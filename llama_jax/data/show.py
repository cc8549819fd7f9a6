"""`show`: a batch as text, with learnt tokens in colour."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.data.batch import Batch
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer

_PROMPT, _LEARNT, _RULE, _END = "\x1b[2m", "\x1b[1;32m", "\x1b[36m", "\x1b[0m"
_MARKS = ("⟦", "⟧")  # around learnt text without colours


class _Run(NamedTuple):
    text: str
    is_learnt: bool


def show(
    batch: Batch, tokenizer: Tokenizer, *, rows: int | None = None, colour: bool = True
) -> list[str]:
    """Show a batch as lines of text.

    Learnt tokens are green, others dim; without colours, learnt ones are in brackets
    ⟦ ⟧. A line names each segment. Special tokens are spelled out, and control
    characters escaped.

    Args:
      batch: the batch.
      tokenizer: tokenizer of its ids.
      rows: number of rows to show; None shows all.
      colour: use ANSI colours.
    """
    arrays = Batch(*(np.asarray(array) for array in batch))  # type: ignore[arg-type]
    lines = []
    for b in range(len(arrays.tokens))[:rows]:
        tokens, targets, mask, segments, positions = (array[b] for array in arrays)
        numbers = [int(number) for number in np.unique(segments) if number]
        T, filled = len(tokens), int((segments > 0).sum())
        learnt = int((mask > 0).sum())
        lines.append(
            f"row {b}: {len(numbers)} segment{'s' * (len(numbers) != 1)} in "
            f"{filled} of {T} slots, {learnt} learnt"
        )
        for number in numbers:
            slots = np.flatnonzero(segments == number)
            ids = [*tokens[slots].tolist(), int(targets[slots[-1]])]
            marks = [False, *(mask[slots] > 0).tolist()]
            if not marks[-1]:  # it may be any id
                ids, marks = ids[:-1], marks[:-1]
            first, last = positions[slots[[0, -1]]].tolist()
            rule = (
                f"── segment {number}: positions {first} to {last}, "
                f"{sum(marks)} learnt "
            )
            lines.append(_paint(f"{rule:─<78}", _RULE if colour else ""))
            lines += _lines(_runs(tokenizer, ids, marks), colour=colour)
    return lines


def _runs(tokenizer: Tokenizer, ids: list[int], marks: list[bool]) -> Iterator[_Run]:
    """Runs of text, alternately learnt and not."""
    decoder = StreamDecoder(tokenizer)
    text, before = "", False
    for id, mark in zip(ids, marks, strict=True):
        if mark != before and text:
            yield _Run(text, before)
            text = ""
        before = mark
        text += _visible(decoder.push([id])) or _special(tokenizer, id)
    yield _Run(text + _visible(decoder.flush()), before)


def _special(tokenizer: Tokenizer, id: int) -> str:
    """The name of a token without text; nothing for a part of a character."""
    infilling = tokenizer.infilling or ()
    if id in (tokenizer.bos_id, tokenizer.eos_id, *infilling):
        return tokenizer.piece(id)
    named = id < tokenizer.vocab_size and tokenizer.piece(id)
    return named if named and named.startswith("<|") else ""


def _visible(text: str) -> str:
    """Text with control characters escaped, which is safe in a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _lines(runs: Iterator[_Run], *, colour: bool) -> list[str]:
    lines = [""]
    for text, is_learnt in runs:
        before, after = _MARKS if is_learnt and not colour else ("", "")
        style = (_LEARNT if is_learnt else _PROMPT) if colour else ""
        # Colours end with each line, so that each can be printed alone.
        parts = f"{before}{text}{after}".split("\n")
        lines[-1] += _paint(parts[0], style)
        lines += [_paint(part, style) for part in parts[1:]]
    return lines


def _paint(text: str, style: str) -> str:
    return f"{style}{text}{_END}" if style and text else text
