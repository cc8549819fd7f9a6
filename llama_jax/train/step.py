"""A training step for any loss and any trained leaves.

A batch is processed in one or several parts, whose loss sums and gradients are added,
so that many small parts equal the large batch up to rounding.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from llama_jax.arguments import checked
from llama_jax.errors import ConfigError, TrainError
from llama_jax.train.losses import Loss, LossSums
from llama_jax.train.state import TrainState
from llama_jax.types import Array, Bool, Float, PyTree

Sums: TypeAlias = tuple[LossSums, PyTree]
"""Sums of the loss and their gradient."""


class StepMetrics(NamedTuple):
    """Metrics of a step, on the device.

    Attributes:
      loss: mean over the targets of the batch, before the update.
      weight: number of targets (their total weight).
      grad_norm: global norm of the gradients, before clipping.
      skipped: whether loss or gradient was not finite, so that nothing was updated.
      metrics: means of what else the loss reports.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    grad_norm: Float[Array, ""]
    skipped: Bool[Array, ""]
    metrics: Mapping[str, Float[Array, ""]]


class Step:
    """A jitted step: (state, frozen leaves, batch) to the next state and metrics.

    The state is donated, and the next one has its shardings: left to itself the
    compiler may reshard a leaf, and the second step would be compiled again.
    """

    def __init__(self, step: Callable[..., tuple[TrainState, StepMetrics]]) -> None:
        self._step = step
        self._jitted: dict[PyTree, Any] = {}

    def __call__(
        self, state: TrainState, frozen: PyTree, batch: PyTree
    ) -> tuple[TrainState, StepMetrics]:
        """Take the step."""
        result: tuple[TrainState, StepMetrics]
        result = self._jit_for(state)(state, frozen, batch)
        return result

    def lower(
        self, state: TrainState, frozen: PyTree, batch: PyTree
    ) -> jax.stages.Lowered:
        """Lower the step for arrays or their shapes."""
        lowered: jax.stages.Lowered = self._jit_for(state).lower(state, frozen, batch)
        return lowered

    @property
    def num_programs(self) -> int:
        """The number of compiled programs."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())

    def _jit_for(self, state: TrainState) -> Any:
        leaves, structure = jax.tree.flatten(state)
        shardings = tuple(_named_sharding(leaf) for leaf in leaves)
        if (shardings, structure) not in self._jitted:
            state_shardings = jax.tree.unflatten(structure, shardings)
            self._jitted[shardings, structure] = jax.jit(
                self._step, donate_argnums=0, out_shardings=(state_shardings, None)
            )
        return self._jitted[shardings, structure]


def _named_sharding(leaf: object) -> NamedSharding | None:
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


@checked(TrainError)
def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Step:
    """Make a jitted training step, which donates its state.

    Args:
      loss: loss of trained leaves, frozen leaves and a batch.
      optimizer: of the trained leaves.
      accumulate: parts G of a batch that are processed one after another. Part g takes
        rows g, g + G, …, so that on a mesh all devices share each part.

    >>> import jax.numpy as jnp, optax, llama_jax
    >>> from llama_jax.train.losses import LossSums
    >>> def loss(params, frozen, batch):
    ...     return LossSums(jnp.sum((params["x"] - batch) ** 2), jnp.float32(4))
    >>> optimizer = optax.sgd(0.5)
    >>> step = make_train_step(loss, optimizer)
    >>> state = llama_jax.init_state({"x": jnp.zeros(())}, optimizer)
    >>> state, metrics = step(state, {}, jnp.full(4, 3.0))
    >>> float(metrics.loss), float(state.params["x"])
    (9.0, 3.0)
    """
    return Step(functools.partial(_step, loss, optimizer, accumulate))


def _step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    frozen: PyTree,
    batch: PyTree,
) -> tuple[TrainState, StepMetrics]:
    sums, grads = _sums_and_gradients(loss, accumulate, state.params, frozen, batch)
    # A batch without targets gives 0 / 0, and is skipped below.
    grads = jax.tree.map(lambda g: (g / sums.weight).astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums.total / sums.weight) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if_finite = functools.partial(jnp.where, finite)
    next_state = TrainState(
        step=state.step + 1,
        params=jax.tree.map(if_finite, params, state.params),
        opt_state=jax.tree.map(if_finite, opt_state, state.opt_state),
    )
    metrics = StepMetrics(
        loss=sums.total / sums.weight,
        weight=sums.weight,
        grad_norm=norm,
        skipped=~finite,
        metrics={name: total / sums.weight for name, total in sums.metrics.items()},
    )
    return next_state, metrics


def _sums_and_gradients(
    loss: Loss, parts: int, params: PyTree, frozen: PyTree, batch: PyTree
) -> tuple[LossSums, PyTree]:
    """The sums of the loss, and the gradient of their total."""

    def total(params: PyTree, batch: PyTree) -> tuple[Array, LossSums]:
        sums = loss(params, frozen, batch)
        return sums.total, sums

    gradient = jax.grad(total, has_aux=True)
    if parts == 1:
        grads, sums = gradient(params, batch)
        return sums, grads

    def add(so_far: Sums, part: PyTree) -> tuple[Sums, None]:
        grads, sums = gradient(params, part)
        return jax.tree.map(jnp.add, so_far, (sums, grads)), None

    cut = jax.tree.map(functools.partial(_cut, parts), batch)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[::-1])
    (sums, grads), _ = jax.lax.scan(add, zeros, cut)
    return sums, grads


def _cut(parts: int, rows: Array) -> Array:
    """Reshape `[B, ...]` to `[G, B / G, ...]`: part g has rows g, g + G, …"""
    batch = rows.shape[0]
    if batch % parts:
        raise ConfigError(
            f"accumulate: a batch of {batch} rows cannot be cut into {parts} equal "
            "parts; choose a divisor"
        )
    return rows.reshape(batch // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
