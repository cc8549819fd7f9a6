"""Ring attention: a sequence over many devices, each with its part of every row.

The n devices of a mesh axis stand in a ring (arXiv:2310.01889). Keys and values travel
around it, one device further at every step, while queries stay. A causal mask would
leave the first device idle and the last with all the work; so the sequence is cut into
2n chunks, and each device holds one from the front and one from the back:

    n = 4     device 0: chunks 0 7   1: 1 6   2: 2 5   3: 3 4        ("zigzag")

                 keys of the same    of an earlier   of a later device
                   (step 0)            (e < d)          (e > d)
                 front   back        front   back     front   back
    front q      causal   ·           all     ·         ·      ·
    back  q       all    causal       all     ·        all    all

At every step but the first each device does two chunks' worth of work without a mask:
the back queries against the front keys, and one product more. Which, is a choice of
operands, not of programs: all devices run the same one.

* on each device: its q, k, v, the output so far and log Σ exp(scores), in float32;
* on the wire: k and v (and in the backward pass their gradients, float32), and the
  next ones are under way while those that are here are used.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from llama_jax.kernels.blocks import Part, Passes, join, passes_of


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """The places of a sequence in the order in which the ring's devices hold them.

    `x[:, zigzag_order(T, n)]`, split evenly over n devices, is what `ring_attention`
    takes; `jnp.argsort` of it is the way back.

    Raises:
      ValueError: the length cannot be cut into 2n chunks.
    """
    if length % (2 * devices):
        raise ValueError(
            f"a sequence of {length} cannot be cut into 2 · {devices} chunks; pad it "
            f"to {length + -length % (2 * devices)}"
        )
    chunks = np.arange(length).reshape(2 * devices, -1)
    pairs = [(chunks[d], chunks[2 * devices - 1 - d]) for d in range(devices)]
    return np.concatenate([np.concatenate(pair) for pair in pairs])


def in_order(x: Array, axis_name: Any, *, axis: int) -> Array:
    """A device's part of a sequence, from that of its `zigzag_order`.

    Of its two chunks one has an even number: both go to where their numbers belong.

    Args:
      x: within `jax.shard_map`, any array of places.
      axis_name: the mesh axis that the sequence is split over.
      axis: of `x` that the places lie along.
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
    axis_name: str,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Literal["xla", "mosaic_tpu"] = "xla",
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """Causal attention over a mesh axis, within `jax.shard_map`.

    Args:
      q: this device's queries: two chunks, in the order of `zigzag_order`.
      k: its keys.
      v: its values.
      axis_name: the mesh axis that the sequence is split over.
      segment_ids: of its places; a query sees its own segment only.
      implementation: of the work on each device.
      interpret: run a kernel without its device, slowly.
    """
    passes = passes_of(implementation, interpret=interpret)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    out = _attend(q.swapaxes(1, 2), k, v, segment_ids, axis_name, passes)
    return out.swapaxes(1, 2)


def _next(tree: Any, axis: str) -> Any:
    """What the device before this one had."""
    devices = jax.lax.axis_size(axis)
    ring = [(d, (d + 1) % devices) for d in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, ring), tree)


def _halves(x: Array, axis: int) -> tuple[Array, Array]:
    front, back = jnp.split(x, 2, axis=axis)
    return front, back


def _is_earlier(step: Array, axis: str) -> Array:
    """Whether the keys that are here at a step are of a device before this one."""
    return step <= jax.lax.axis_index(axis)


def _ids(q_ids: Array | None, kv_ids: Array | None) -> Any:
    return None if q_ids is None else (q_ids, kv_ids)


def _chosen(earlier: Array, front: Any, back: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(earlier, a, b), front, back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Any, k: Any, v: Any, ids: Any, axis: str, passes: Passes) -> Array:
    return _forward(q, k, v, ids, axis, passes)[0]


def _forward(
    q: Any, k: Any, v: Any, ids: Any, axis: str, passes: Passes
) -> tuple[Array, Any]:
    rows, _, length, _ = q.shape
    all_seen = jnp.full((rows,), length // 2, jnp.int32)
    q_front, q_back = _halves(q, 2)
    i_front, i_back = (None, None) if ids is None else _halves(ids, 1)

    def fold(carry: Any, step: Array) -> Any:
        (front, back), travelling = carry
        k, v, kv_ids = travelling
        coming = _next(travelling, axis)
        earlier = _is_earlier(step, axis)
        (k_front, k_back), (v_front, v_back) = _halves(k, 2), _halves(v, 2)
        j_front, j_back = (None, None) if kv_ids is None else _halves(kv_ids, 1)
        back = join(back, passes.forward(
            q_back, k_front, v_front, all_seen, _ids(i_back, j_front)
        ))  # fmt: skip
        some_q, some_k, some_v, some_i, some_j = _chosen(
            earlier,
            (q_front, k_front, v_front, i_front, j_front),
            (q_back, k_back, v_back, i_back, j_back),
        )
        found = passes.forward(some_q, some_k, some_v, all_seen, _ids(some_i, some_j))
        into: Part = _chosen(earlier, front, back)
        joined = join(into, found)
        front = _chosen(earlier, joined, front)
        back = _chosen(earlier, back, joined)
        return ((front, back), coming), None

    out, lse = passes.forward(q, k, v, None, _ids(ids, ids))
    halves = tuple(zip(_halves(out, 2), _halves(lse, 2), strict=True))
    steps = jnp.arange(1, jax.lax.axis_size(axis))
    # The last step's keys are sent on for nothing: n - 1 steps share one program.
    (halves, _), _ = jax.lax.scan(fold, (halves, _next((k, v, ids), axis)), steps)
    (out, lse) = (jnp.concatenate(both, axis=2) for both in zip(*halves, strict=True))
    out = out.astype(q.dtype)
    return out, (q, k, v, ids, out, lse)


def _backward(axis: str, passes: Passes, kept: Any, d_out: Array) -> Any:
    q, k, v, ids, out, lse = kept
    rows, _, length, _ = q.shape
    half = length // 2
    all_seen = jnp.full((rows,), half, jnp.int32)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    queries = (q, lse, delta, d_out)
    q_front, q_back = zip(*(_halves(x, 2) for x in queries), strict=True)
    i_front, i_back = (None, None) if ids is None else _halves(ids, 1)

    def grads(queries: Any, k: Any, v: Any, ids: Any) -> Any:
        q, lse, delta, do = queries
        return passes.backward(q, k, v, all_seen, ids, lse, delta, do)

    def put(front: Any, back: Any) -> Array:
        return jnp.concatenate([front, back], axis=2)

    def fold(carry: Any, step: Array) -> Any:
        dq, arriving, sums = carry
        k, v, kv_ids = arriving
        dk, dv = _next(sums, axis)
        coming = _next(arriving, axis)
        earlier = _is_earlier(step, axis)
        (k_front, k_back), (v_front, v_back) = _halves(k, 2), _halves(v, 2)
        j_front, j_back = (None, None) if kv_ids is None else _halves(kv_ids, 1)
        dq_back, dk_front, dv_front = grads(
            q_back, k_front, v_front, _ids(i_back, j_front)
        )
        some_q, some_k, some_v, some_i, some_j = _chosen(
            earlier,
            (q_front, k_front, v_front, i_front, j_front),
            (q_back, k_back, v_back, i_back, j_back),
        )
        more = grads(some_q, some_k, some_v, _ids(some_i, some_j))
        on_front, on_back = (
            jax.tree.map(lambda x, here=here: jnp.where(here, x, 0.0), more)
            for here in (earlier, ~earlier)
        )
        dq = dq + put(on_front[0], dq_back + on_back[0])
        dk = dk + put(dk_front + on_front[1], on_back[1])
        dv = dv + put(dv_front + on_front[2], on_back[2])
        return (dq, coming, (dk, dv)), None

    dq, dk, dv = passes.backward(q, k, v, None, _ids(ids, ids), lse, delta, d_out)
    steps = jnp.arange(1, jax.lax.axis_size(axis))
    carry = dq, _next((k, v, ids), axis), (dk, dv)
    (dq, _, sums), _ = jax.lax.scan(fold, carry, steps)
    dk, dv = _next(sums, axis)  # once more, and they are home
    no_derivative = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), ids)
    return *(x.astype(q.dtype) for x in (dq, dk, dv)), no_derivative


_attend.defvjp(_forward, _backward)
