"""Softmax in parts: results over disjoint parts, joined by their log-sum-exps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AxisName = str | tuple[str, ...]
"""A mesh axis, or several."""

Part = tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]
"""Output of attention over some of the slots, and log Σ exp(scores) over these."""


def join(one: Part, other: Part) -> Part:
    """Join the results of attention over two disjoint parts of the slots."""
    lse = jnp.logaddexp(one[1], other[1])
    # Where both are -inf their difference would be NaN.
    w_one, w_other = (
        jnp.where(lse == -jnp.inf, 0.0, jnp.exp(part[1] - lse))[..., None]
        for part in (one, other)
    )
    return one[0] * w_one + other[0] * w_other, lse


def weight_over_axis(lse: Array, axis_name: AxisName) -> Array:
    """Weight of this device's part among those of a mesh axis, in `jax.shard_map`.

    Args:
      lse: log-sum-exp of this device's part; -inf where it is empty.
      axis_name: mesh axis.

    Returns:
      exp(lse) / Σ_devices exp(lse): the `psum` of weighted outputs is the joint output.
    """
    part, total, _ = _exp_over_axis(lse, axis_name)
    return part / total


def logsumexp_over_axis(lse: Array, axis_name: AxisName) -> Array:
    """Log-sum-exp over all devices of a mesh axis, in `jax.shard_map`."""
    _, total, largest = _exp_over_axis(lse, axis_name)
    return largest + jnp.log(total)


def _exp_over_axis(lse: Array, axis_name: AxisName) -> tuple[Array, Array, Array]:
    """exp(lse - m), its sum over the axis, and m, the maximum over the axis."""
    largest = jax.lax.pmax(lse, axis_name)
    part = jnp.exp(lse - largest)
    return part, jax.lax.psum(part, axis_name), largest
