"""Both passes of attention over a part of the slots.

Outputs over parts of the slots are joined by log Σ exp(scores) of each part (`lse`, see
`kernels.logsumexp`); the gradients of each part follow from the joined `lse`. Ring
attention and caches that are sharded over slots are built on this.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.kernels.logsumexp import Part
from llama_jax.kernels.precision import matmul_precision
from llama_jax.kernels.reference import causal_mask
from llama_jax.kernels.tpu.flash import blocks_for
from llama_jax.kernels.tpu.flash_backward import Grads, flash_backward
from llama_jax.kernels.tpu.flash_forward import flash_forward

Ids = tuple[Int[Array, "B T"], Int[Array, "B S"]] | None


class Passes(NamedTuple):
    """Both passes over `q [B, N, T, H]` and `k, v [B, K, S, H]`; results are float32.

    Attributes:
      forward: (q, k, v, q_start, ids) to the output and `lse`; where a query attends to
        nothing, the output is 0 and `lse` -inf.
      backward: (q, k, v, q_start, ids, lse, delta, d_out) to the gradients of q, k and
        v, where `lse` is that of all parts and `delta` is Σ_H out·d_out.
    """

    forward: Callable[..., Part]
    backward: Callable[..., Grads]


def passes_of(
    implementation: Literal["xla", "mosaic_tpu"], *, interpret: bool = False
) -> Passes:
    """Return the passes of an implementation."""
    if implementation == "xla":
        return Passes(_xla_forward, _xla_backward)
    return Passes(
        functools.partial(_tpu_forward, interpret=interpret),
        functools.partial(_tpu_backward, interpret=interpret),
    )


def _tpu_forward(
    q: Array, k: Array, v: Array, q_start: Array | None, ids: Ids, *, interpret: bool
) -> Part:
    tiles = blocks_for(q.dtype).forward
    out, lse = flash_forward(
        q, k, v, q_start, ids,
        tiles=tiles, out_dtype=jnp.float32, interpret=interpret,
    )  # fmt: skip
    assert lse is not None
    return out, lse


def _tpu_backward(
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    ids: Ids,
    lse: Array,
    delta: Array,
    d_out: Array,
    *,
    interpret: bool,
) -> Grads:
    blocks = blocks_for(q.dtype)
    return flash_backward(
        q, k, v, q_start, ids, lse, delta, d_out.astype(q.dtype),
        tiles=blocks.backward, chunk=blocks.chunk, interpret=interpret,
    )  # fmt: skip


def _grouped(x: Float[Array, "B N T ..."], groups: int) -> Float[Array, "B K GT ..."]:
    """The rows of the query heads that share a key/value head, one after another."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[3:])


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
        axes,
        a,
        b,
        precision=matmul_precision(b.dtype),
        preferred_element_type=jnp.float32,
    )


def _scores(q: Array, k: Array, q_start: Array | None, ids: Ids) -> tuple[Array, Array]:
    """Scores of grouped rows in float32, and where queries attend."""
    queries, groups = q.shape[2], k.shape[1]
    scores = _product("BKQH,BKSH->BKQS", _grouped(q, groups), k)
    seen = causal_mask(q_start, None, queries, k.shape[2])
    if ids is not None:
        seen = seen & (ids[0][:, :, None] == ids[1][:, None, :])
    seen = jnp.tile(seen, (1, q.shape[1] // groups, 1))[:, None]
    return scores * q.shape[3] ** -0.5, seen


def _xla_forward(q: Array, k: Array, v: Array, q_start: Array | None, ids: Ids) -> Part:
    scores, seen = _scores(q, k, q_start, ids)
    scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    p = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0.0)
    out = _product("BKQS,BKSH->BKQH", p.astype(v.dtype), v)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _xla_backward(
    q: Array,
    k: Array,
    v: Array,
    q_start: Array | None,
    ids: Ids,
    lse: Array,
    delta: Array,
    d_out: Array,
) -> Grads:
    groups = k.shape[1]
    scores, seen = _scores(q, k, q_start, ids)
    rows, d_rows = _grouped(q, groups), _grouped(d_out.astype(q.dtype), groups)
    lse, delta = (_grouped(x, groups)[..., None] for x in (lse, delta))
    p = jnp.where(seen, jnp.exp(scores - lse), 0.0)
    ds = p * (_product("BKQH,BKSH->BKQS", d_rows, v) - delta) * q.shape[3] ** -0.5
    p, ds = p.astype(q.dtype), ds.astype(q.dtype)
    dq = _product("BKQS,BKSH->BKQH", ds, k).reshape(q.shape)
    dk = _product("BKQS,BKQH->BKSH", ds, rows)
    return dq, dk, _product("BKQS,BKQH->BKSH", p, d_rows)
