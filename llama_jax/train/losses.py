"""Losses as sums, which can be added over parts of a batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from llama_jax.arguments import checked
from llama_jax.data.batch import Batch
from llama_jax.errors import TrainError
from llama_jax.model.lora import Lora, adapt
from llama_jax.model.transformer import Llama, ScalarModel, apply
from llama_jax.types import Array, Float, Params, PyTree


class LossSums(NamedTuple):
    """Sums over a batch, or over part of one.

    Attributes:
      total: sum of weighted losses; the loss (and its gradient) is total / weight.
      weight: sum of weights: the number of targets, if each counts the same.
      metrics: other weighted sums to report; each is divided by `weight`.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: Mapping[str, Float[Array, ""]] = {}


Loss = Callable[[PyTree, PyTree, PyTree], LossSums]
"""Maps trained leaves, frozen leaves and a batch to sums."""

ModelLoss = Callable[[Any, Params, PyTree], LossSums]
"""Maps a model, its parameters and a batch to sums."""


@checked(TrainError)
def next_token_loss(model: Llama, params: Params, batch: Batch) -> LossSums:
    """Compute the cross-entropy of the targets (nats), weighted by the loss mask.

    Args:
      model: language model.
      params: its parameters.
      batch: token ids, targets and mask, `[B, T]`.

    Returns:
      Sums over all targets; a position with mask 0 has no effect, even if it is NaN.

    >>> import jax.numpy as jnp, llama_jax
    >>> loaded = llama_jax.load()
    >>> ids = jnp.asarray([[1, 403, 407, 261]])
    >>> ones = jnp.ones_like(ids[:, 1:])
    >>> batch = llama_jax.Batch(
    ...     ids[:, :-1], ids[:, 1:], ones.astype(float), ones, jnp.arange(3)[None]
    ... )
    >>> sums = llama_jax.next_token_loss(loaded.model, loaded.params, batch)
    >>> float(sums.weight)
    3.0
    """
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
    # A masked loss can be NaN, and 0 * NaN is NaN.
    weighted = jnp.where(weights == 0.0, 0.0, losses * weights)
    return LossSums(jnp.sum(weighted), jnp.sum(weights))


def trained_loss(
    model: Llama | ScalarModel,
    loss: ModelLoss = next_token_loss,
    lora: Lora | None = None,
) -> Loss:
    """Make the loss of a model's trained leaves: of all weights, or of adapters.

    Args:
      model: the model.
      loss: loss of a model, its parameters and a batch.
      lora: configuration of the adapters; None if the trained leaves are the weights
        themselves, with no frozen leaves.
    """

    def of_weights(params: Params, frozen: Params, batch: PyTree) -> LossSums:
        return loss(model, params, batch)

    def of_adapters(adapters: Params, frozen: Params, batch: PyTree) -> LossSums:
        assert lora is not None
        return loss(model, adapt(frozen, adapters, lora.scaling), batch)

    return of_weights if lora is None else of_adapters
