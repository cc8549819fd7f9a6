"""One step of training, whatever is trained and whatever the loss.

The batch goes forwards and backwards in one or several parts, whose gradients are
added up: sums of sums, so that many small parts are the large batch up to rounding.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from llama_jax.errors import ConfigError
from llama_jax.train.losses import Loss, LossSums
from llama_jax.train.state import TrainState
from llama_jax.types import Array, Bool, Float


class StepMetrics(NamedTuple):
    """What a step says, still on the device.

    Attributes:
      loss: mean over the targets of the batch, before the step.
      weight: how many targets that were.
      grad_norm: of all gradients together, before they are clipped.
      skipped: the loss or a gradient was not finite, and nothing was changed.
      metrics: what else the loss reports.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    grad_norm: Float[Array, ""]
    skipped: Bool[Array, ""]
    metrics: Mapping[str, Float[Array, ""]]


class Step:
    """A jitted step: (state, frozen leaves, batch) to the next state and metrics.

    The state is donated, and comes back where it lay: left to itself the compiler may
    move a leaf over a mesh, and the second step would be compiled anew.
    """

    def __init__(self, run: Callable[..., tuple[TrainState, StepMetrics]]) -> None:
        """Of a function of the three."""
        self._run = run
        self._jitted: dict[Any, Any] = {}

    def __call__(
        self, state: TrainState, frozen: Any, batch: Any
    ) -> tuple[TrainState, StepMetrics]:
        """Take the step."""
        found: tuple[TrainState, StepMetrics]
        found = self._of(state)(state, frozen, batch)
        return found

    def lower(self, state: Any, frozen: Any, batch: Any) -> Any:
        """The step of arrays or of their shapes, ready to be compiled."""
        return self._of(state).lower(state, frozen, batch)

    @property
    def programs(self) -> int:
        """How many there are in jax's cache."""
        return sum(jitted._cache_size() for jitted in self._jitted.values())

    def _of(self, state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        places = tuple(_place(leaf) for leaf in leaves)
        if (places, structure) not in self._jitted:
            whole = jax.tree.unflatten(structure, places)
            self._jitted[places, structure] = jax.jit(
                self._run, donate_argnums=0, out_shardings=(whole, None)
            )
        return self._jitted[places, structure]


def _place(leaf: Any) -> NamedSharding | None:
    place = getattr(leaf, "sharding", None)
    return place if isinstance(place, NamedSharding) else None


def make_train_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1
) -> Step:
    """A jitted step; its state is donated: use the one that is returned.

    Args:
      loss: of trained leaves, frozen leaves and a batch.
      optimizer: of the trained leaves.
      accumulate: parts that a batch is cut into, one after another; each takes every
        so manyth row, so that on a mesh all devices share each part.
    """
    return Step(functools.partial(_step, loss, optimizer, accumulate))


def _step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    frozen: Any,
    batch: Any,
) -> tuple[TrainState, StepMetrics]:
    sums, grads = _summed(loss, accumulate, state.params, frozen, batch)
    # A batch without targets has no gradient, and no loss: 0 / 0 is skipped below.
    grads = jax.tree.map(lambda g: (g / sums.weight).astype(g.dtype), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(sums.total / sums.weight) & jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    kept = functools.partial(jnp.where, finite)
    new = TrainState(
        step=state.step + 1,
        params=jax.tree.map(kept, params, state.params),
        opt_state=jax.tree.map(kept, opt_state, state.opt_state),
    )
    metrics = StepMetrics(
        loss=sums.total / sums.weight,
        weight=sums.weight,
        grad_norm=norm,
        skipped=~finite,
        metrics={name: one / sums.weight for name, one in sums.metrics.items()},
    )
    return new, metrics


def _summed(
    loss: Loss, parts: int, params: Any, frozen: Any, batch: Any
) -> tuple[LossSums, Any]:
    """The loss's sums and their gradient."""

    def total(params: Any, batch: Any) -> tuple[Array, LossSums]:
        sums = loss(params, frozen, batch)
        return sums.total, sums

    gradient = jax.grad(total, has_aux=True)
    if parts == 1:
        grads, sums = gradient(params, batch)
        return sums, grads

    def add(so_far: Any, part: Any) -> tuple[Any, None]:
        grads, sums = gradient(params, part)
        return jax.tree.map(jnp.add, so_far, (sums, grads)), None

    cut = jax.tree.map(functools.partial(_cut, parts), batch)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], cut))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[::-1])
    (sums, grads), _ = jax.lax.scan(add, zeros, cut)
    return sums, grads


def _cut(parts: int, rows: Array) -> Array:
    """`[B, ...]` to `[G, B / G, ...]`: part g has rows g, g + G, and so on."""
    batch = rows.shape[0]
    if batch % parts:
        raise ConfigError(
            f"a batch of {batch} rows cannot be accumulated in {parts} parts; choose "
            "a batch that is divisible by them"
        )
    return rows.reshape(batch // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
