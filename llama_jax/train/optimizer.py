"""Optimizers and learning-rate schedules: optax, with the Llama 2 paper's settings."""

from collections.abc import Callable
from typing import Literal

import jax
import optax
import optax.contrib
from jax.typing import DTypeLike

from llama_jax.arguments import checked
from llama_jax.errors import ConfigError
from llama_jax.types import Array, PyTree

OptimizerName = Literal["adamw", "adafactor", "lion", "muon"]
ScheduleName = Literal["cosine", "linear", "constant"]
Schedule = Callable[[Array | int], Array | float]


@checked(ConfigError)
def make_schedule(
    name: ScheduleName,
    peak: float,
    *,
    steps: int,
    warmup: int = 0,
    final: float = 0.1,
) -> Schedule:
    """Make a learning-rate schedule: linear warm-up, then decay.

    Args:
      name: "cosine" and "linear" decay to `final` times the peak; "constant" does not
        decay.
      peak: rate after warm-up.
      steps: total steps, including warm-up.
      warmup: steps of warm-up; the first has a rate above zero.
      final: fraction of the peak at the end (arXiv:2307.09288, 2.2: a tenth).

    Returns:
      The rate as a function of the step, for optax.

    Raises:
      ConfigError: a value is out of range.

    >>> schedule = make_schedule("linear", 1.0, steps=12, warmup=2, final=0.0)
    >>> [float(schedule(step)) for step in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if not peak > 0 or steps < 1 or not 0 <= warmup <= steps or not 0 <= final <= 1:
        raise ConfigError(
            f"schedule: got a peak of {peak}, {warmup} of {steps} steps of warm-up and "
            f"final {final}; the peak must be positive, warm-up no longer than the "
            "run, and final between 0 and 1"
        )
    decay_steps = max(steps - warmup, 1)
    decay: Schedule
    if name == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=final)
    elif name == "linear":
        decay = optax.linear_schedule(peak, final * peak, decay_steps)
    else:
        decay = optax.constant_schedule(peak)
    if not warmup:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


@checked(ConfigError)
def make_optimizer(
    learning_rate: float | Schedule,
    *,
    name: OptimizerName = "adamw",
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-5,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    moment_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Make AdamW with Llama 2's settings (arXiv:2307.09288, 2.2), or another optimizer.

    Args:
      learning_rate: rate, or schedule.
      name: "adamw", "adafactor" (second moments as rows and columns, no first moments),
        "lion" (first moments only) or "muon" (orthogonalized first moments for the
        matrices of layers, with updates as large as AdamW's, arXiv:2502.16982; AdamW
        with Nesterov momentum for the rest).
      b1: decay of first moments; Adafactor has none.
      b2: decay of second moments; Adafactor has its own schedule.
      eps: of AdamW.
      weight_decay: of all weights but norms.
      clip: maximum of the global gradient norm; None has no limit.
      moment_dtype: of first moments; defaults to that of the weights.

    Raises:
      ConfigError: there is no such optimizer.

    >>> import jax.numpy as jnp
    >>> optimizer = make_optimizer(1e-3)
    >>> state = optimizer.init({"x": jnp.zeros(3)})
    """
    optimizer: optax.GradientTransformation
    if name == "adamw":
        optimizer = optax.adamw(
            learning_rate,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=decayed,
            mu_dtype=moment_dtype,
        )
    elif name == "adafactor":
        optimizer = _decaying(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            learning_rate,
            weight_decay,
        )
    elif name == "lion":
        optimizer = optax.lion(
            learning_rate,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=decayed,
            mu_dtype=moment_dtype,
        )
    else:
        orthogonal = optax.contrib.muon(
            1.0,
            adam_b1=b1,
            adam_b2=b2,
            mu_dtype=moment_dtype,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
        optimizer = _decaying(orthogonal, learning_rate, weight_decay)
    if clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def decayed(params: PyTree) -> PyTree[bool]:
    """A tree of booleans: which leaves have weight decay, all but norms' scales."""

    def is_decayed(path: tuple[object, ...], _: object) -> bool:
        return getattr(path[-1], "key", None) != "scale"

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _decaying(
    rateless: optax.GradientTransformation,
    learning_rate: float | Schedule,
    weight_decay: float,
) -> optax.GradientTransformation:
    """Add a learning rate, and weight decay in proportion to it, as AdamW has."""
    return optax.chain(
        rateless,
        optax.scale(-1.0),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def _matrices(params: PyTree) -> PyTree:
    """The matrix axes of a layer's leaf; None for leaves that Muon leaves to AdamW."""

    def axes(
        path: tuple[object, ...], leaf: Array
    ) -> optax.contrib.MuonDimensionNumbers | None:
        names = [getattr(part, "key", None) for part in path]
        if "layers" not in names or names[-1] == "scale":
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)
