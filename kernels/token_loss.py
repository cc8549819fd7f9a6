"""Unembedding and cross-entropy in one, a few tokens at a time.

The logits of a whole batch are the largest array of a training step: `[B, T, V]` in
float32, and once more for their gradient. Here only those of a chunk of each row exist
at any time, forward and backward; the backward pass computes them again.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 256,
    axis_name: Any = None,
) -> Float[Array, "B T"]:
    """-log softmax(x · head) of each target, in nats, float32.

    Sums are float32 whatever the dtype of `x`. At most `[B, chunk, V]` logits exist at
    a time.

    Args:
      x: what the transformer gives, behind its last norm.
      head: the unembedding, or a transposed embedding.
      targets: the token that follows each; any id in `range(V)` where the loss is not
        looked at.
      chunk: tokens of each row that are computed together.
      axis_name: within `jax.shard_map`, the mesh axis that V is cut over: the head is
        then this device's part of it; ids, losses and `x` are of the whole.

    Raises:
      ValueError: `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    size = min(chunk, max(x.shape[1], 1))
    return _losses(size, axis_name, x, head, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(chunk: int, axis: Any, x: Array, head: Array, targets: Array) -> Array:
    return _forward(chunk, axis, x, head, targets)[0]


def _forward(
    chunk: int, axis: Any, x: Array, head: Array, targets: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    targets = targets - _first_id(head, axis)

    def one(_: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        rows, wanted = part
        logits = _logits(rows, head)
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.sum(jnp.where(_is(wanted, logits), logits, 0.0), axis=-1)
        if axis is not None:
            most = jax.lax.pmax(total, axis)
            total = most + jnp.log(jax.lax.psum(jnp.exp(total - most), axis))
            chosen = jax.lax.psum(chosen, axis)
        return None, (total - chosen, total)

    _, (losses, totals) = jax.lax.scan(
        one, None, (_cut(x, chunk), _cut(targets, chunk))
    )
    losses, totals = (_joined(parts, targets.shape) for parts in (losses, totals))
    return losses, (x, head, targets, totals)


def _backward(
    chunk: int, axis: Any, kept: tuple[Array, Array, Array, Array], given: Array
) -> tuple[Array, Array, None]:
    x, head, targets, totals = kept
    if axis is not None:
        # `shard_map` gives each device of the axis its part of what comes back, and
        # adds up what they say of `x`.
        given = jax.lax.psum(given, axis)

    def one(
        of_head: Array, part: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array]:
        rows, wanted, total, weight = part
        of_logits = jnp.exp(_logits(rows, head) - total[..., None])
        of_logits -= _is(wanted, of_logits).astype(jnp.float32)
        of_logits = (of_logits * weight[..., None]).astype(rows.dtype)
        of_rows = _product("RV,DV->RD", of_logits, head).astype(rows.dtype)
        return of_head + _product("RD,RV->DV", rows, of_logits), of_rows

    # Behind the end there is no weight, so that what lies there adds nothing.
    rows, wanted = _cut(x, chunk), _cut(targets, chunk)
    parts = rows, wanted, _cut(totals, chunk), _cut(given, chunk)
    of_head, of_x = jax.lax.scan(one, jnp.zeros(head.shape, jnp.float32), parts)
    return _joined(of_x, x.shape), of_head.astype(head.dtype), None


_losses.defvjp(_forward, _backward)


def _first_id(head: Array, axis: Any) -> Array | int:
    """The id of the first column of this device's part of the head."""
    return 0 if axis is None else jax.lax.axis_index(axis) * head.shape[1]


def _is(wanted: Array, logits: Array) -> Array:
    """Which logit is the wanted one's, if any is."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return ids == wanted[..., None]


def _logits(rows: Array, head: Array) -> Array:
    return _product("RD,DV->RV", rows, head)


def _product(axes: str, a: Array, b: Array) -> Array:
    """In the dtype of the activations, summed in float32; float32 means float32."""
    exact = a.dtype == jnp.float32
    return jnp.einsum(
        axes,
        a,
        b.astype(a.dtype),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _cut(array: Array, chunk: int) -> Array:
    """`[B, T, ...]` to `[T / chunk, B · chunk, ...]`, filled up with zeros.

    One axis of rows: XLA:CPU refuses some products in bfloat16 that sum over two.
    """
    batch, length = array.shape[:2]
    pad = [(0, 0), (0, -length % chunk)] + [(0, 0)] * (array.ndim - 2)
    cut = jnp.pad(array, pad).reshape(batch, -1, chunk, *array.shape[2:])
    return cut.swapaxes(0, 1).reshape(-1, batch * chunk, *array.shape[2:])


def _joined(parts: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_cut`, to the B and the T that `shape` begins with."""
    batch, length = shape[:2]
    joined = parts.reshape(parts.shape[0], batch, -1, *parts.shape[2:]).swapaxes(0, 1)
    return joined.reshape(batch, -1, *parts.shape[2:])[:, :length]


def greedy_tokens(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    *,
    chunk: int = 256,
    axis_name: Any = None,
) -> Int[Array, "B T"]:
    """Compute the likeliest token after each token, argmax(x · head), in chunks.

    Arguments are those of `token_losses`; of equal logits, the lowest id counts.

    Raises:
      ValueError: `chunk` is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")
    first = _first_id(head, axis_name)

    def of_chunk(_: None, rows: Array) -> tuple[None, Array]:
        logits = _logits(rows, head)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32) + first
        if axis_name is not None:
            largest = jnp.max(logits, axis=-1)
            is_best = largest == jax.lax.pmax(largest, axis_name)
            last = jnp.iinfo(jnp.int32).max
            tokens = jax.lax.pmin(jnp.where(is_best, tokens, last), axis_name)
        return None, tokens

    size = min(chunk, max(x.shape[1], 1))
    _, tokens = jax.lax.scan(of_chunk, None, _cut(x, size))
    return _joined(tokens, x.shape)
