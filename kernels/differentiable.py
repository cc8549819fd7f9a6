"""The custom gradient that all flash attention kernels share."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def differentiable(
    forward: Callable[..., tuple[Array, Array | None]],
    backward: Callable[..., tuple[Array, Array, Array]],
    *,
    inference: Callable[..., Array] | None = None,
) -> Callable[..., Array]:
    """Attention `(settings, q, k, v, q_start, segment_ids)` from its two passes.

    Args:
      forward: (settings, q, k, v, q_start, segment_ids) to the output and its
        log-sum-exp.
      backward: (settings, q, k, v, q_start, segment_ids, output, log-sum-exp, gradient
        of the output) to the gradients of q, k and v.
      inference: like `forward` but only the output, for calls that are not
        differentiated; defaults to `forward` without its log-sum-exp.
    """

    def attend(settings: object, *inputs: Array | None) -> Array:
        if inference is not None:
            return inference(settings, *inputs)
        return forward(settings, *inputs)[0]

    def forward_rule(
        settings: object, *inputs: Array | None
    ) -> tuple[Array, tuple[Array | None, ...]]:
        out, lse = forward(settings, *inputs)
        return out, (*inputs, out, lse)

    def backward_rule(
        settings: object, residuals: tuple[Array | None, ...], d_out: Array
    ) -> tuple[Array | None, ...]:
        return *backward(settings, *residuals, d_out), None, None

    with_gradient = jax.custom_vjp(attend, nondiff_argnums=(0,))
    with_gradient.defvjp(forward_rule, backward_rule)
    return with_gradient


def output_dot_gradient(out: Array, d_out: Array) -> Array:
    """Σ_H out · d_out of every query, float32: the backward passes' Δ."""
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
