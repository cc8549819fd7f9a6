"""Weights that lie over several processes, whole in one of them: leaf after leaf."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.distributed import agreed, is_main, place
from llama_jax.errors import CheckpointError

_DONE, _FAILED, _FIRST = 0, 1, 2


@contextlib.contextmanager
def gathered(
    leaves: Mapping[str, LazyLeaf],
) -> Iterator[Mapping[str, LazyLeaf] | None]:
    """The leaves where they are to be written: in process 0; None in the others.

    A leaf is brought together when process 0 reads it, in whatever order that is, and
    for as long every device has it whole. The others take part in that, and go on when
    process 0 has left the block.

    Raises:
      CheckpointError: in the others, if it failed in process 0.
    """
    if place()[1] == 1:
        yield leaves
        return
    if is_main():
        try:
            yield {
                path: dataclasses.replace(leaf, read=functools.partial(_read, n, leaf))
                for n, (path, leaf) in enumerate(leaves.items())
            }
        except BaseException:
            agreed(_FAILED)
            raise
        agreed(_DONE)
        return
    in_order = list(leaves.values())
    while (told := agreed(_DONE)) >= _FIRST:
        in_order[told - _FIRST].read()
    if told == _FAILED:
        raise CheckpointError("process 0 could not write the checkpoint; it says why")
    yield None


def _read(number: int, leaf: LazyLeaf) -> np.ndarray:
    agreed(_FIRST + number)
    return leaf.read()
