"""`Batch`: the input of a training step; padding and packing of examples into it."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.errors import DataError
from llama_jax.types import Array, Float, Int, PyTree


class Batch(NamedTuple):
    """Rows of tokens, their targets, and which targets are learnt.

    Attributes:
      tokens: ids; any id in empty slots.
      targets: the id that follows each token; any id if the mask is 0.
      loss_mask: weight of each target's loss; 0 if it is not learnt.
      segment_ids: number of the packed example that a token belongs to, from 1; 0 in
        empty slots. A token does not see other segments.
      positions: RoPE indices; they restart in each segment.

    >>> import numpy as np
    >>> example = Example(np.arange(4, dtype=np.int32), np.ones(4, bool))
    >>> batch = pad([example], length=4)
    >>> batch.tokens.tolist(), batch.targets.tolist(), batch.loss_mask.tolist()
    ([[0, 1, 2, 0]], [[1, 2, 3, 0]], [[1.0, 1.0, 1.0, 0.0]])
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    loss_mask: Float[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class Example(NamedTuple):
    """A record, or a window of one, as n + 1 ids that fill n slots of a row.

    The first id is never a target, and the last is only a target.

    Attributes:
      ids: int32 [n + 1].
      mask: bool [n + 1]; which ids are learnt.
      origin: index of the record in its epoch's order, of the window in the record, and
        of the first id in the window.
    """

    ids: np.ndarray
    mask: np.ndarray
    origin: tuple[int, int, int] = (0, 0, 0)

    @property
    def size(self) -> int:
        """The number of slots."""
        return len(self.ids) - 1

    def cut(self, size: int) -> tuple["Example", "Example"]:
        """Cut after `size` slots; the id between the parts is in both."""
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
    """Pack examples into rows of `length` slots.

    Each row repeatedly takes the first of the next `look_ahead` examples that fits. So
    the oldest is always taken, and none waits forever.

    Args:
      examples: none larger than `length`.
      length: T.
      look_ahead: number of examples to choose from.
      split: fill up a row that none fits with the beginning of the next example whose
        tokens are all learnt; the rest of it waits.
      waiting: examples that come first. Whenever a row is yielded, the list has those
        that were read from `examples` and are in no row yet.

    Raises:
      DataError: an example is larger than `length`.
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
                    f"batch: an example has {waiting[0].size} slots, but a row only "
                    f"{length}; raise the length"
                )
            return
        yield row


def pad(examples: Sequence[Example], length: int) -> Batch:
    """Make a batch with one example per row; see `assemble`."""
    return assemble([[example] for example in examples], length)


def assemble(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """Make the NumPy arrays of a batch.

    Args:
      rows: examples of each row, perhaps none.
      length: T.

    Raises:
      DataError: the examples of a row do not fit.
    """
    B, T = len(rows), length
    tokens, targets, segment_ids, positions = np.zeros((4, B, T), np.int32)
    loss_mask = np.zeros((B, T), np.float32)
    for b, row in enumerate(rows):
        if (filled := sum(example.size for example in row)) > T:
            raise DataError(
                f"batch: row {b} has {filled} tokens for {T} slots; raise the length"
            )
        start = 0
        for segment, example in enumerate(row, start=1):
            slots = slice(start, start + example.size)
            tokens[b, slots] = example.ids[:-1]
            targets[b, slots] = example.ids[1:]
            loss_mask[b, slots] = example.mask[1:]
            segment_ids[b, slots] = segment
            positions[b, slots] = np.arange(example.size)
            start += example.size
    arrays: list[PyTree] = [tokens, targets, loss_mask, segment_ids, positions]
    return Batch(*arrays)


def check_targets(batch: Batch) -> None:
    """Raise a `DataError` if a batch has no target."""
    if not np.any(batch.loss_mask):
        raise DataError(
            "batch has no target tokens (the loss mask is all zeros); give records "
            "with answers, or a longer sequence length"
        )
