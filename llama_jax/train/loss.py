"""What training makes smaller, as sums that may be added up over parts of a batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from llama_jax.data.batch import Batch
from llama_jax.model.transformer import Llama, apply
from llama_jax.types import Array, Float, Params


class LossSums(NamedTuple):
    """Sums over a batch, or over a part of one.

    Attributes:
      total: of weighted losses; the loss is total / weight, and its gradient too.
      weight: of the weights: how many targets, where each counts the same.
      metrics: other weighted sums to report, divided by `weight` in the end.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: Mapping[str, Float[Array, ""]] = {}


Loss = Callable[[Any, Any, Any], LossSums]
"""(trained leaves, frozen leaves, batch) to sums."""


def next_token_loss(model: Llama, params: Params, batch: Batch) -> LossSums:
    """Cross-entropy of the targets (nats), weighted by the batch's mask."""
    losses = apply(
        model,
        params,
        batch.tokens,
        batch.targets,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        method="losses",
    )
    weights = batch.loss_mask.astype(jnp.float32)
    # A loss that does not count may be anything: zero times it would not be zero.
    counted = jnp.where(weights == 0.0, 0.0, losses * weights)
    return LossSums(jnp.sum(counted), jnp.sum(weights))
