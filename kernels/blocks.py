"""The two passes of attention over some of the slots, by implementation.

What a query finds in parts of the slots can be put together afterwards, given
log Σ exp(scores) of each part; and every part's gradients follow from that of all.
Ring attention is built on it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.kernels.reference import causal_mask, precision_of
from llama_jax.kernels.tpu.flash import blocks_for
from llama_jax.kernels.tpu.flash_backward import flash_backward
from llama_jax.kernels.tpu.flash_forward import flash_forward

Ids = tuple[Int[Array, "B T"], Int[Array, "B S"]] | None
Part = tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]


class Passes(NamedTuple):
    """Both passes, over `q [B, N, T, H]` and `k, v [B, K, S, H]`, in float32.

    Attributes:
      forward: (q, k, v, q_start, ids) to the output and log Σ exp(scores), which is
        -inf (and the output zero) where a query sees nothing.
      backward: (q, k, v, q_start, ids, lse, delta, do) to the gradients of q, k and v,
        where `lse` is of all parts and `delta` is Σ o·do.
    """

    forward: Callable[..., Part]
    backward: Callable[..., tuple[Array, Array, Array]]


def passes_of(
    implementation: Literal["xla", "mosaic_tpu"], *, interpret: Any = False
) -> Passes:
    """The passes of an implementation."""
    if implementation == "xla":
        return Passes(_xla_forward, _xla_backward)
    return Passes(
        functools.partial(_tpu_forward, interpret=interpret),
        functools.partial(_tpu_backward, interpret=interpret),
    )


def join(one: Part, other: Part) -> Part:
    """What queries find in two parts of the slots, as if these were one."""
    lse = jnp.logaddexp(one[1], other[1])
    # Where neither saw anything, -inf less -inf would be no number.
    of_one, of_other = (
        jnp.where(lse == -jnp.inf, 0.0, jnp.exp(part[1] - lse))[..., None]
        for part in (one, other)
    )
    return one[0] * of_one + other[0] * of_other, lse


def _tpu_forward(
    q: Any, k: Any, v: Any, q_start: Any, ids: Ids, *, interpret: Any
) -> Any:
    tiles = blocks_for(q.dtype).forward
    return flash_forward(
        q, k, v, q_start, ids,
        tiles=tiles, out_dtype=jnp.float32, interpret=interpret,
    )  # fmt: skip


def _tpu_backward(
    q: Any, k: Any, v: Any, q_start: Any, ids: Ids, lse: Any, delta: Any, do: Any, *,
    interpret: Any,
) -> Any:  # fmt: skip
    sizes = blocks_for(q.dtype)
    return flash_backward(
        q, k, v, q_start, ids, lse, delta, do.astype(q.dtype),
        tiles=sizes.backward, chunk=sizes.chunk, interpret=interpret,
    )  # fmt: skip


def _grouped(x: Float[Array, "B N T ..."], groups: int) -> Float[Array, "B K GT ..."]:
    """The rows of the query heads that share a key/value head, one behind another."""
    return x.reshape(x.shape[0], groups, -1, *x.shape[3:])


def _scores(q: Any, k: Any, q_start: Any, ids: Ids) -> tuple[Array, Array]:
    """Scores of grouped rows in float32, and where they count."""
    queries, groups = q.shape[2], k.shape[1]
    scores = jnp.einsum(
        "BKQH,BKSH->BKQS",
        _grouped(q, groups),
        k,
        precision=precision_of(q.dtype),
        preferred_element_type=jnp.float32,
    )
    seen = causal_mask(q_start, None, queries, k.shape[2])
    if ids is not None:
        seen &= ids[0][:, :, None] == ids[1][:, None, :]
    seen = jnp.tile(seen, (1, q.shape[1] // groups, 1))[:, None]
    return scores * q.shape[3] ** -0.5, seen


def _xla_forward(q: Any, k: Any, v: Any, q_start: Any, ids: Ids) -> Part:
    scores, seen = _scores(q, k, q_start, ids)
    scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    p = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0.0)
    out = jnp.einsum(
        "BKQS,BKSH->BKQH",
        p.astype(v.dtype),
        v,
        precision=precision_of(v.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _xla_backward(
    q: Any, k: Any, v: Any, q_start: Any, ids: Ids, lse: Any, delta: Any, do: Any
) -> Any:
    groups = k.shape[1]
    product = functools.partial(
        jnp.einsum,
        precision=precision_of(q.dtype),
        preferred_element_type=jnp.float32,
    )
    scores, seen = _scores(q, k, q_start, ids)
    rows, d_rows = _grouped(q, groups), _grouped(do.astype(q.dtype), groups)
    lse, delta = (_grouped(x, groups)[..., None] for x in (lse, delta))
    p = jnp.where(seen, jnp.exp(scores - lse), 0.0)
    ds = p * (product("BKQH,BKSH->BKQS", d_rows, v) - delta) * q.shape[3] ** -0.5
    p, ds = p.astype(q.dtype), ds.astype(q.dtype)
    dq = product("BKQS,BKSH->BKQH", ds, k).reshape(q.shape)
    dk = product("BKQS,BKQH->BKSH", ds, rows)
    return dq, dk, product("BKQS,BKQH->BKSH", p, d_rows)
