"""The mean loss over held-out targets, each of which counts the same."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from llama_jax.distributed import to_host
from llama_jax.errors import DataError
from llama_jax.train.loss import Loss, LossSums

Sums = Callable[[Any, Any, Any], LossSums]


class Evaluation(NamedTuple):
    """A mean, and of how much.

    Attributes:
      loss: mean over all targets (nats).
      targets: how many there were.
    """

    loss: float
    targets: float


def make_evaluate(loss: Loss) -> Sums:
    """The loss's sums, jitted: nothing is donated and nothing learnt."""
    return jax.jit(loss)


def evaluate(
    sums: Sums,
    params: Any,
    frozen: Any,
    batches: Iterable[Any],
    *,
    place: Callable[[Any], Any] = lambda batch: batch,
) -> Evaluation:
    """The mean loss over all batches together, weighted by their targets.

    Args:
      sums: of `make_evaluate`.
      params: trained leaves.
      frozen: the others.
      batches: all of the held-out data, this process's rows.
      place: brings a batch to the devices.

    Raises:
      DataError: there is no target in any of them.
    """
    found = []
    for batch in batches:
        one = sums(params, frozen, place(batch))
        found.append((one.total, one.weight))
        if len(found) > 1:  # the device stays one batch ahead, and no more
            found[-2] = to_host(found[-2])
    found[-1:] = [to_host(one) for one in found[-1:]]
    total = sum(float(one[0]) for one in found)
    weight = sum(float(one[1]) for one in found)
    if not weight:
        raise DataError("evaluation: the held-out data has no target; give answers")
    return Evaluation(total / weight, weight)
