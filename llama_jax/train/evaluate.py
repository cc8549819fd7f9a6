"""The mean loss over held-out data, in which each target counts the same."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax

from llama_jax.distributed import to_host
from llama_jax.errors import DataError
from llama_jax.train.losses import Loss, LossSums
from llama_jax.types import PyTree


class Evaluation(NamedTuple):
    """Means over all batches.

    Attributes:
      loss: mean over all targets (nats).
      targets: number of targets (their total weight).
      metrics: means of what else the loss reports.
    """

    loss: float
    targets: float
    metrics: Mapping[str, float]

    def record(self) -> dict[str, float]:
        """Numbers for a step's record: `eval_loss`, `eval_targets`, `eval_<metric>`."""
        metrics = {f"eval_{name}": value for name, value in self.metrics.items()}
        return metrics | {"eval_loss": self.loss, "eval_targets": self.targets}


def make_evaluate(loss: Loss) -> Loss:
    """Jit the sums of a loss, without gradient or donation."""
    jitted: Loss = jax.jit(loss)
    return jitted


def evaluate(
    sums: Loss,
    params: PyTree,
    frozen: PyTree,
    batches: Iterable[PyTree],
    *,
    device_put: Callable[[PyTree], PyTree] = lambda batch: batch,
) -> Evaluation:
    """Compute the mean loss over all batches, weighted by their targets.

    Args:
      sums: from `make_evaluate`.
      params: trained leaves.
      frozen: frozen leaves.
      batches: all of the held-out data, this process's rows.
      device_put: puts a batch on the devices.

    Raises:
      DataError: no batch has a target.
    """
    results: list[LossSums] = []
    for batch in batches:
        results.append(sums(params, frozen, device_put(batch)))
        if len(results) > 1:  # the device stays one batch ahead, and no more
            results[-2] = to_host(results[-2])
    results[-1:] = [to_host(result) for result in results[-1:]]
    weight = sum(float(result.weight) for result in results)
    if not weight:
        raise DataError(
            "evaluation: held-out data has no target tokens; give records with answers"
        )
    return Evaluation(
        sum(float(result.total) for result in results) / weight,
        weight,
        {
            name: sum(float(result.metrics[name]) for result in results) / weight
            for name in results[0].metrics
        },
    )
