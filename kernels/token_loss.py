"""Unembedding and cross-entropy in chunks of tokens.

The logits of a batch are the largest array of a training step: `[B, T, V]` in float32,
and as much again for their gradient. Here only the logits of one chunk of each row
exist at a time; the backward pass recomputes them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.kernels.logsumexp import AxisName, logsumexp_over_axis
from llama_jax.kernels.precision import matmul_precision


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 256,
    axis_name: AxisName | None = None,
) -> Float[Array, "B T"]:
    """Compute the cross-entropy of each target, -log softmax(x · head), in nats.

    At most `[B, chunk, V]` logits exist at a time. Sums are float32 for any dtype.

    Args:
      x: output of the transformer after its final norm.
      head: unembedding matrix, or a transposed embedding.
      targets: next token of each token; where the loss is not used, any id in
        `range(V)`.
      chunk: tokens of each row that are computed together.
      axis_name: within `jax.shard_map`, the mesh axis that V is sharded over: `head` is
        this device's part, everything else is replicated.

    Returns:
      The float32 loss of each target.

    Raises:
      ValueError: `chunk` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from llama_jax.kernels import token_losses
      >>> x, head = jnp.zeros((1, 3, 8)), jnp.ones((8, 100))
      >>> token_losses(x, head, jnp.array([[5, 0, 99]]))  # log 100 each
      Array([[4.6051702, 4.6051702, 4.6051702]], dtype=float32)
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    size = min(chunk, max(x.shape[1], 1))
    return _losses(size, axis_name, x, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(
    chunk: int, axis: AxisName | None, x: Array, head: Array, targets: Array
) -> Array:
    return _forward(chunk, axis, x, head, targets)[0]


def _forward(
    chunk: int, axis: AxisName | None, x: Array, head: Array, targets: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    targets = targets - _first_id(head, axis)

    def of_chunk(
        _: None, part: tuple[Array, Array]
    ) -> tuple[None, tuple[Array, Array]]:
        rows, target = part
        logits = _logits(rows, head)
        lse = jax.nn.logsumexp(logits, axis=-1)
        score = jnp.sum(jnp.where(_is_target(target, logits), logits, 0.0), axis=-1)
        if axis is not None:
            lse = logsumexp_over_axis(lse, axis)
            score = jax.lax.psum(score, axis)
        return None, (lse - score, lse)

    _, (losses, lses) = jax.lax.scan(
        of_chunk, None, (_cut(x, chunk), _cut(targets, chunk))
    )
    losses, lses = (_joined(parts, targets.shape) for parts in (losses, lses))
    return losses, (x, head, targets, lses)


def _backward(
    chunk: int,
    axis: AxisName | None,
    residuals: tuple[Array, Array, Array, Array],
    d_losses: Array,
) -> tuple[Array, Array, None]:
    x, head, targets, lses = residuals
    if axis is not None:
        # `shard_map` gives each device of the axis its share of the cotangent, and adds
        # up their gradients of `x`.
        d_losses = jax.lax.psum(d_losses, axis)

    def of_chunk(
        d_head: Array, part: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array]:
        rows, target, lse, d_loss = part
        d_logits = jnp.exp(_logits(rows, head) - lse[..., None])
        d_logits -= _is_target(target, d_logits).astype(jnp.float32)
        d_logits = (d_logits * d_loss[..., None]).astype(rows.dtype)
        d_rows = _product("RV,DV->RD", d_logits, head).astype(rows.dtype)
        return d_head + _product("RD,RV->DV", rows, d_logits), d_rows

    # The padding of the last chunk has d_loss 0, so it adds nothing.
    parts = (
        _cut(x, chunk),
        _cut(targets, chunk),
        _cut(lses, chunk),
        _cut(d_losses, chunk),
    )
    d_head, d_x = jax.lax.scan(of_chunk, jnp.zeros(head.shape, jnp.float32), parts)
    return _joined(d_x, x.shape), d_head.astype(head.dtype), None


_losses.defvjp(_forward, _backward)


def _first_id(head: Array, axis: AxisName | None) -> Array | int:
    """The id of the first column of this device's part of the head."""
    return 0 if axis is None else jax.lax.axis_index(axis) * head.shape[1]


def _is_target(target: Array, logits: Array) -> Array:
    """True at the logit of each row's target, if this device has it."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return ids == target[..., None]


def _logits(rows: Array, head: Array) -> Array:
    return _product("RD,DV->RV", rows, head)


def _product(axes: str, a: Array, b: Array) -> Array:
    """A product in the dtype of the activations, accumulated in float32."""
    return jnp.einsum(
        axes,
        a,
        b.astype(a.dtype),
        precision=matmul_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _cut(array: Array, chunk: int) -> Array:
    """`[B, T, ...]` to `[T / chunk, B · chunk, ...]`, padded with zeros.

    The rows are one axis: XLA:CPU rejects some bfloat16 products that sum over two.
    """
    batch, length = array.shape[:2]
    pad = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (array.ndim - 2)
    cut = jnp.pad(array, pad).reshape(batch, -1, chunk, *array.shape[2:])
    return cut.swapaxes(0, 1).reshape(-1, batch * chunk, *array.shape[2:])


def _joined(parts: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_cut`, to the B and T with which `shape` begins."""
    batch, length = shape[:2]
    joined = parts.reshape(parts.shape[0], batch, -1, *parts.shape[2:]).swapaxes(0, 1)
    return joined.reshape(batch, -1, *parts.shape[2:])[:, :length]


class GreedyTokens(NamedTuple):
    """The likeliest token after each token, and its -log p (nats, float32)."""

    tokens: Int[Array, "B T"]
    losses: Float[Array, "B T"]


def greedy_tokens(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    *,
    chunk: int = 256,
    axis_name: AxisName | None = None,
) -> GreedyTokens:
    """Compute the likeliest token after each token, argmax(x · head), and its loss.

    In chunks; arguments are those of `token_losses`. Of equal logits, the lowest id
    counts.

    Raises:
      ValueError: `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    first = _first_id(head, axis_name)

    def of_chunk(_: None, rows: Array) -> tuple[None, GreedyTokens]:
        logits = _logits(rows, head)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32) + first
        largest = jnp.max(logits, axis=-1)
        if axis_name is not None:
            is_best = largest == jax.lax.pmax(largest, axis_name)
            last = jnp.iinfo(jnp.int32).max
            tokens = jax.lax.pmin(jnp.where(is_best, tokens, last), axis_name)
            largest = jax.lax.pmax(largest, axis_name)
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        return None, GreedyTokens(tokens, jnp.log(total))

    size = min(chunk, max(x.shape[1], 1))
    _, parts = jax.lax.scan(of_chunk, None, _cut(x, size))
    return GreedyTokens(*(_joined(part, x.shape) for part in parts))
