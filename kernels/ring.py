"""Ring attention: causal attention with the sequence sharded over a mesh axis.

The n devices of the axis form a ring (arXiv:2310.01889). Keys and values move to the
next device at every step, while queries stay. With a causal mask and a contiguous split
the first device would be idle and the last would have all the work; so the sequence is
cut into 2n chunks, and each device holds one from the front and one from the back:

    n = 4     device 0: chunks 0 7   1: 1 6   2: 2 5   3: 3 4        ("zigzag")

                 keys of the same    of an earlier   of a later device
                   (step 0)            (e < d)          (e > d)
                 front   back        front   back     front   back
    front q      causal   ·           all     ·         ·      ·
    back  q       all    causal       all     ·        all    all

At every step but the first each device does two chunks' worth of work without a mask:
the back queries against the front keys, and one more product. Which one is selected by
its operands, not by control flow: all devices run the same program.

* per device: its q, k, v, the output so far and log Σ exp(scores), in float32;
* communicated: k and v (and their float32 gradients in the backward pass); those of the
  next step are sent while the current ones are used.
"""

from typing import Literal, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.kernels.differentiable import differentiable, output_dot_gradient
from llama_jax.kernels.logsumexp import AxisName, Part, join
from llama_jax.kernels.partial_attention import Ids, Passes, passes_of
from llama_jax.kernels.tpu.flash_backward import Grads

Tree = TypeVar("Tree")

Queries: TypeAlias = tuple[Array | None, ...]
"""Segment ids of a chunk of queries, and what the pass needs of them."""

Arriving: TypeAlias = tuple[Array, Array, Array | None]
"""Keys, values and segment ids of another device."""

Operands: TypeAlias = tuple[list[Array | None], tuple[Array, Array, Array, Ids]]
"""Queries without their ids, and (k, v, q_start, ids) as `Passes` take them."""


def zigzag_order(length: int, devices: int) -> Int[np.ndarray, " T"]:
    """Return the sequence indices in the order in which the ring's devices hold them.

    `x[:, zigzag_order(T, n)]`, split evenly over n devices, is the input of
    `ring_attention`; indexing with its `jnp.argsort` restores the sequence.

    Args:
      length: T.
      devices: n.

    Raises:
      ValueError: the length is no multiple of 2n.
    """
    if length % (2 * devices):
        raise ValueError(
            f"a sequence of {length} cannot be cut into 2 · {devices} chunks; pad it "
            f"to {length + -length % (2 * devices)}"
        )
    chunks = np.arange(length).reshape(2 * devices, -1)
    pairs = [(chunks[d], chunks[2 * devices - 1 - d]) for d in range(devices)]
    return np.concatenate([np.concatenate(pair) for pair in pairs])


def in_order(x: Array, axis_name: AxisName, *, axis: int) -> Array:
    """Exchange chunks so that an array in `zigzag_order` is in sequence order.

    One of a device's two chunks has an even number: each is sent where its number
    belongs.

    Args:
      x: within `jax.shard_map`, this device's part of an array.
      axis_name: mesh axis that the sequence is sharded over.
      axis: sequence axis of `x`.

    Returns:
      This device's part of the array in sequence order.
    """
    devices = jax.lax.axis_size(axis_name)
    ranks = range(devices)
    pairs = [sorted((d, 2 * devices - 1 - d), key=lambda c: c % 2) for d in ranks]
    front, back = jnp.split(x, 2, axis=axis)
    is_even = jax.lax.axis_index(axis_name) % 2 == 0
    chunks = (
        jnp.where(is_even, front, back),
        jnp.where(is_even, back, front),
    )
    sent = [
        jax.lax.ppermute(chunk, axis_name, [(d, pairs[d][odd] // 2) for d in ranks])
        for odd, chunk in enumerate(chunks)
    ]
    return jnp.concatenate(sent, axis=axis)


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    axis_name: AxisName,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Literal["xla", "mosaic_tpu"] = "xla",
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Compute causal attention over a mesh axis, within `jax.shard_map`.

    Args:
      q: this device's queries: two chunks, in the order of `zigzag_order`.
      k: its keys.
      v: its values.
      axis_name: mesh axis that the sequence is sharded over.
      segment_ids: segments of its tokens; a query attends within its own.
      implementation: implementation of the work on each device.
      interpret: run the kernel in interpret mode, on any device.

    Returns:
      This device's part of the output.
    """
    settings = axis_name, passes_of(implementation, interpret=interpret)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    out = _attend(settings, q.swapaxes(1, 2), k, v, None, segment_ids)
    return out.swapaxes(1, 2)


def _shift(tree: Tree, axis: AxisName) -> Tree:
    """The arrays of the previous device of the ring."""
    devices = jax.lax.axis_size(axis)
    ring = [(d, (d + 1) % devices) for d in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)


def _halves(tree: Tree, axis: int) -> tuple[Tree, Tree]:
    """Front and back chunk of every array."""
    front, back = (
        jax.tree.map(lambda x, half=half: jnp.split(x, 2, axis)[half], tree)
        for half in (0, 1)
    )
    return front, back


def _select(condition: Array, one: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), one, other)


def _pairs(
    axis: AxisName,
    step: Array,
    queries: tuple[Queries, ...],
    arriving: Arriving,
) -> tuple[Array, Operands, Operands]:
    """The two products of a step: back queries with front keys, and a selected one.

    Args:
      axis: the ring's mesh axis.
      step: from 1 on.
      queries: front and back queries, each (ids, ...).
      arriving: k, v and segment ids of another device.

    Returns:
      Whether that device is an earlier one; then, for both products, the queries and
      (k, v, ids) as `Passes` take them.
    """
    earlier = step <= jax.lax.axis_index(axis)
    (k_front, k_back), (v_front, v_back) = (_halves(x, 2) for x in arriving[:2])
    j_front, j_back = _halves(arriving[2], 1)
    front, back = queries
    all_seen = jnp.full((k_front.shape[0],), k_front.shape[2], jnp.int32)

    def operands(
        queries: Queries, k: Array, v: Array, kv_ids: Array | None
    ) -> Operands:
        q_ids, *rest = queries
        ids = None if q_ids is None or kv_ids is None else (q_ids, kv_ids)
        return rest, (k, v, all_seen, ids)

    selected = _select(
        earlier, (front, k_front, v_front, j_front), (back, k_back, v_back, j_back)
    )
    return earlier, operands(back, k_front, v_front, j_front), operands(*selected)


def _forward(
    settings: tuple[AxisName, Passes],
    q: Array,
    k: Array,
    v: Array,
    q_start: None,
    ids: Array | None,
) -> tuple[Array, Array]:
    axis, passes = settings
    queries = tuple(zip(_halves(ids, 1), _halves(q, 2), strict=True))

    def fold(
        carry: tuple[tuple[Part, Part], Arriving], step: Array
    ) -> tuple[tuple[tuple[Part, Part], Arriving], None]:
        (front, back), arriving = carry
        following = _shift(arriving, axis)
        earlier, fixed, selected = _pairs(axis, step, queries, arriving)
        back = join(back, passes.forward(*fixed[0], *fixed[1]))
        other = passes.forward(*selected[0], *selected[1])
        joined: Part = join(_select(earlier, front, back), other)
        front = _select(earlier, joined, front)
        back = _select(earlier, back, joined)
        return ((front, back), following), None

    part = passes.forward(q, k, v, None, None if ids is None else (ids, ids))
    steps = jnp.arange(1, jax.lax.axis_size(axis))
    # The last step sends its keys on for nothing: n - 1 steps share one program.
    carry = _halves(part, 2), _shift((k, v, ids), axis)
    (halves, _), _ = jax.lax.scan(fold, carry, steps)
    out, lse = (jnp.concatenate(both, axis=2) for both in zip(*halves, strict=True))
    return out.astype(q.dtype), lse


def _backward(
    settings: tuple[AxisName, Passes],
    q: Array,
    k: Array,
    v: Array,
    q_start: None,
    ids: Array | None,
    out: Array,
    lse: Array,
    d_out: Array,
) -> tuple[Array, Array, Array]:
    axis, passes = settings
    delta = output_dot_gradient(out, d_out)
    rows = _halves((q, lse, delta, d_out), 2)
    queries = tuple((i, *half) for i, half in zip(_halves(ids, 1), rows, strict=True))

    def grads(queries: list[Array | None], slots: tuple[Array | Ids, ...]) -> Grads:
        q, *rest = queries
        return passes.backward(q, *slots, *rest)

    def concatenate(front: Array, back: Array) -> Array:
        return jnp.concatenate([front, back], axis=2)

    def fold(
        carry: tuple[Array, Arriving, tuple[Array, Array]], step: Array
    ) -> tuple[tuple[Array, Arriving, tuple[Array, Array]], None]:
        dq, arriving, sums = carry
        dk, dv = _shift(sums, axis)
        following = _shift(arriving, axis)
        earlier, fixed, selected = _pairs(axis, step, queries, arriving)
        dq_back, dk_front, dv_front = grads(*fixed)
        other = grads(*selected)
        on_front, on_back = (
            jax.tree.map(lambda x, mask=mask: jnp.where(mask, x, 0.0), other)
            for mask in (earlier, ~earlier)
        )
        dq = dq + concatenate(on_front[0], dq_back + on_back[0])
        dk = dk + concatenate(dk_front + on_front[1], on_back[1])
        dv = dv + concatenate(dv_front + on_front[2], on_back[2])
        return (dq, following, (dk, dv)), None

    both = None if ids is None else (ids, ids)
    dq, dk, dv = passes.backward(q, k, v, None, both, lse, delta, d_out)
    steps = jnp.arange(1, jax.lax.axis_size(axis))
    carry = dq, _shift((k, v, ids), axis), (dk, dv)
    (dq, _, sums), _ = jax.lax.scan(fold, carry, steps)
    dk, dv = _shift(sums, axis)  # back on their own device
    return dq.astype(q.dtype), dk.astype(q.dtype), dv.astype(q.dtype)


_attend = differentiable(_forward, _backward)
