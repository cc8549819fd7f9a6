"""Gather weights that are sharded over processes, leaf by leaf, in process 0."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.distributed import broadcast_from_main, is_main
from llama_jax.errors import CheckpointError

# What process 0 tells the others: to stop, or to take part in reading leaf n - _FIRST.
_DONE, _FAILED, _FIRST = 0, 1, 2


@contextlib.contextmanager
def gathered_to_main(
    leaves: Mapping[str, LazyLeaf],
) -> Iterator[Mapping[str, LazyLeaf] | None]:
    """Yield whole leaves in process 0, and None in the others when it has finished.

    Process 0 may read the leaves in any order. Each is gathered when it is read, and
    every device holds all of it meanwhile.

    Raises:
      CheckpointError: in the other processes, if process 0 failed.
    """
    if jax.process_count() == 1:
        yield leaves
        return
    if is_main():
        try:
            yield {
                path: dataclasses.replace(leaf, read=functools.partial(_read, n, leaf))
                for n, (path, leaf) in enumerate(leaves.items())
            }
        except BaseException:
            broadcast_from_main(_FAILED)
            raise
        broadcast_from_main(_DONE)
        return
    in_order = list(leaves.values())
    while (message := broadcast_from_main(_DONE)) >= _FIRST:
        in_order[message - _FIRST].read()
    if message == _FAILED:
        raise CheckpointError(
            "process 0 could not write the checkpoint; see its error for the reason"
        )
    yield None


def _read(number: int, leaf: LazyLeaf) -> np.ndarray:
    broadcast_from_main(_FIRST + number)
    return leaf.read()
