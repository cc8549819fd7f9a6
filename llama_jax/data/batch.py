"""`Batch`: what a training step eats, and how records are padded or packed into it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama_jax.errors import DataError
from llama_jax.types import Array, Float, Int


class Batch(NamedTuple):
    """Rows of tokens, what follows each, and which of that is learnt.

    Attributes:
      tokens: ids; any id where nothing is.
      targets: the token that follows each; any id where the mask is 0.
      loss_mask: the weight of each target's loss; 0 where nothing is learnt.
      segment_ids: which of a row's packed records a token belongs to, from 1; 0 where
        nothing is. Tokens of other segments are not seen.
      positions: of rotary embedding; they restart in each segment.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class Example(NamedTuple):
    """A record, or a window of one, as ids: n + 1 of them fill n slots of a row.

    The last id is only ever a target, the first only ever seen.

    Attributes:
      ids: int32 [n + 1].
      mask: bool [n + 1]; which of them are learnt.
      origin: number of the record in its epoch's order, of the window in it, and of
        the window's ids in front of these.
    """

    ids: np.ndarray
    mask: np.ndarray
    origin: tuple[int, int, int] = (0, 0, 0)

    @property
    def size(self) -> int:
        """The slots that it fills."""
        return len(self.ids) - 1

    def cut(self, size: int) -> tuple["Example", "Example"]:
        """The first `size` slots and the others; the id between them is in both."""
        record, window, start = self.origin
        return (
            Example(self.ids[: size + 1], self.mask[: size + 1], self.origin),
            Example(self.ids[size:], self.mask[size:], (record, window, start + size)),
        )


def pack(
    examples: Iterable[Example],
    length: int,
    *,
    look_ahead: int = 64,
    split: bool = False,
    waiting: list[Example] | None = None,
) -> Iterator[list[Example]]:
    """Rows of examples that fit side by side into `length` slots.

    Each row takes, again and again, the first of the next `look_ahead` examples that
    still fits, so that the oldest is always taken and none waits for ever.

    Args:
      examples: none larger than `length`.
      length: T.
      look_ahead: how many examples to choose from.
      split: whether a row that none fits is filled with the beginning of the next that
        is learnt from its first to its last token; its other tokens wait in its place.
      waiting: examples in front of the others. Whenever a row is yielded, the list
        holds what was read of `examples` and is in no row yet.
    """
    source = iter(examples)
    waiting = [] if waiting is None else waiting
    while True:
        row: list[Example] = []
        room = length
        while room:
            missing = max(look_ahead, 1) - len(waiting)
            waiting += itertools.islice(source, max(missing, 0))
            fits = (i for i, example in enumerate(waiting) if example.size <= room)
            if (index := next(fits, None)) is not None:
                row.append(waiting.pop(index))
                room -= row[-1].size
                continue
            whole = (i for i, example in enumerate(waiting) if example.mask.all())
            if split and (index := next(whole, None)) is not None:
                head, waiting[index] = waiting[index].cut(room)
                row.append(head)
            break
        if not row:
            if waiting:
                raise DataError(
                    f"batch: an example fills {waiting[0].size} slots, and a row has "
                    f"{length}"
                )
            return
        yield row


def pad(examples: Sequence[Example], length: int) -> Batch:
    """A batch with one example in each row; the arguments are `assemble`'s."""
    return assemble([[example] for example in examples], length)


def assemble(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """The arrays of a batch, in NumPy.

    Args:
      rows: the examples of each row, which may be none.
      length: T.

    Raises:
      DataError: the examples of a row do not fit into it.
    """
    B, T = len(rows), length
    tokens, targets, segment_ids, positions = np.zeros((4, B, T), np.int32)
    loss_mask = np.zeros((B, T), np.float32)
    for b, row in enumerate(rows):
        if (filled := sum(example.size for example in row)) > T:
            raise DataError(f"batch: row {b} has {filled} tokens for {T} slots")
        start = 0
        for segment, example in enumerate(row, start=1):
            place = slice(start, start + example.size)
            tokens[b, place] = example.ids[:-1]
            targets[b, place] = example.ids[1:]
            loss_mask[b, place] = example.mask[1:]
            segment_ids[b, place] = segment
            positions[b, place] = np.arange(example.size)
            start += example.size
    arrays: list[Any] = [tokens, targets, loss_mask, segment_ids, positions]
    return Batch(*arrays)


def check_targets(batch: Batch) -> None:
    """Raise a `DataError` if nothing in a batch is learnt."""
    if not np.any(batch.loss_mask):
        raise DataError(
            "batch: no token of it is a target, so there is nothing to learn; give "
            "records with answers, or a longer sequence length"
        )
