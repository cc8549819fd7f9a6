"""Optimizers and learning-rate schedules: optax, with the Llama 2 paper's settings."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
import optax.contrib

from llama_jax.errors import ConfigError

OptimizerName = Literal["adamw", "adafactor", "lion", "muon"]
ScheduleName = Literal["cosine", "linear", "constant"]
Schedule = Callable[[Any], Any]


def make_schedule(
    name: ScheduleName,
    peak: float,
    *,
    steps: int,
    warmup: int = 0,
    final: float = 0.1,
) -> Schedule:
    """The learning rate of each step: a linear rise, then a fall.

    Args:
      name: "cosine" or "linear" fall to `final` times the peak; "constant" stays.
      peak: of the rate, reached behind the rise.
      steps: in all, the rise's included.
      warmup: steps of the rise; the first of them has a rate above zero.
      final: part of the peak at the end (arXiv:2307.09288, 2.2: a tenth).

    Raises:
      ConfigError: a number that makes no sense.
    """
    if not peak > 0 or steps < 1 or not 0 <= warmup <= steps or not 0 <= final <= 1:
        raise ConfigError(
            f"schedule: a peak of {peak}, {warmup} of {steps} steps of warm-up and an "
            f"end at {final} of the peak; the peak must be positive, the warm-up no "
            "longer than the run, and the end between 0 and 1"
        )
    left = max(steps - warmup, 1)
    fall: Schedule
    if name == "cosine":
        fall = optax.cosine_decay_schedule(peak, left, alpha=final)
    elif name == "linear":
        fall = optax.linear_schedule(peak, final * peak, left)
    elif name == "constant":
        fall = optax.constant_schedule(peak)
    else:
        raise ConfigError(
            f"schedule: there is no {name!r}; choose from cosine, linear, constant"
        )
    if not warmup:
        return fall
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    learning_rate: float | Schedule,
    *,
    name: OptimizerName = "adamw",
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-5,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
    moment_dtype: Any = None,
) -> optax.GradientTransformation:
    """AdamW as Llama 2 was trained with it (arXiv:2307.09288, 2.2), or another.

    Args:
      learning_rate: or the rate of each step.
      name: "adamw", "adafactor" (second moments as rows and columns, no first ones),
        "lion" (first moments only) or "muon" (first moments made orthogonal for the
        matrices of layers, with updates as large as AdamW's, arXiv:2502.16982; AdamW
        with Nesterov's momentum for the rest).
      b1: of first moments; adafactor has none.
      b2: of second moments; adafactor decays them by a schedule of its own.
      eps: of AdamW.
      weight_decay: of all but norms.
      clip: the most that the norm of all gradients together may be; None for no limit.
      moment_dtype: of first moments; the weights' where not given.

    Raises:
      ConfigError: there is no such optimizer.
    """
    chosen: optax.GradientTransformation
    if name == "adamw":
        chosen = optax.adamw(
            learning_rate,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=decayed,
            mu_dtype=moment_dtype,
        )
    elif name == "adafactor":
        chosen = _decaying(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            learning_rate,
            weight_decay,
        )
    elif name == "lion":
        chosen = optax.lion(
            learning_rate,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=decayed,
            mu_dtype=moment_dtype,
        )
    elif name == "muon":
        orthogonal = optax.contrib.muon(
            1.0,
            adam_b1=b1,
            adam_b2=b2,
            mu_dtype=moment_dtype,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
        chosen = _decaying(orthogonal, learning_rate, weight_decay)
    else:
        raise ConfigError(
            f"optimizer: there is no {name!r}; choose from adamw, adafactor, lion, muon"
        )
    if clip is None:
        return chosen
    return optax.chain(optax.clip_by_global_norm(clip), chosen)


def decayed(params: Any) -> Any:
    """Which leaves of a tree are pulled towards zero: all but norms' scales."""

    def is_decayed(path: tuple[Any, ...], _: Any) -> bool:
        return getattr(path[-1], "key", None) != "scale"

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _decaying(
    rateless: optax.GradientTransformation, learning_rate: Any, weight_decay: float
) -> optax.GradientTransformation:
    """With a rate and with decay in proportion to it, as AdamW has, behind the rest."""
    return optax.chain(
        rateless,
        optax.scale(-1.0),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def _matrices(params: Any) -> Any:
    """Which axes of a layer's leaf are a matrix's; None for what Muon leaves alone."""

    def axes(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [getattr(part, "key", None) for part in path]
        if "layers" not in names or names[-1] == "scale":
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)
