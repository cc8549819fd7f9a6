"""`attention`: one function, and the implementation that computes it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from llama_jax.kernels import reference
from llama_jax.kernels.dispatch import Asked, Implementation, check, choose
from llama_jax.kernels.quantized_slots import QuantizedSlots, dequantize_slots
from llama_jax.kernels.reference import Pages, Slots


def attention(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """Causal grouped-query attention: softmax(q·kᵀ/√H)·v over the slots ≤ the query's.

    Args:
      q: queries; head n reads key/value head n // (N // K).
      k: keys, heads before slots; `QuantizedSlots` where they are held in eight bits.
      v: values, likewise.
      q_start: slot of each row's first query; 0 where not given.
      segment_ids: for packed rows (S = T): a query sees its own segment only.
      implementation: `"auto"` is the best that works on JAX's first device; `explain`
        says which, and why. `"xla"` is plain array operations, works everywhere, and is
        the specification. `"mosaic_tpu"`, `"mosaic_gpu"` (Hopper) and `"triton"` are
        Pallas kernels, `"cudnn"` is NVIDIA's. A named one is never replaced by another.

    Raises:
      ValueError: the implementation does not exist, or does not do what is asked.
    """
    asked = _asked(q, k, q_start)
    name = _named(implementation, asked)
    if name == "xla":
        return reference.attention(q, k, v, q_start=q_start, segment_ids=segment_ids)
    if asked.decoding and segment_ids is None and name in ("mosaic_tpu", "triton"):
        return _decode(_decoder(name), q, k, v, q_start)
    k, v = dequantize_slots(k, q.dtype), dequantize_slots(v, q.dtype)
    return _many(name)(q, k, v, q_start=q_start, segment_ids=segment_ids)


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int[Array, "B M"],
    *,
    q_start: Int[Array, " B"],
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """`attention` over a cache whose slots lie in pages, C to a page, in any order.

    Args:
      q: queries, few of them.
      k_pages: pages of keys, shared by all rows.
      v_pages: of values, likewise.
      page_table: where each row's pages lie; slot s is in page `s // C` of its row.
        Entries behind a row's last slot are not looked at, but must be pages.
      q_start: slot of each row's first query.
      implementation: as of `attention`; cuDNN and `"mosaic_gpu"` read no pages.

    Raises:
      ValueError: the implementation does not exist, or does not do what is asked.
    """
    name = _named(implementation, _asked(q, k_pages, q_start)._replace(paged=True))
    run: Callable[..., Array] = reference.paged_attention
    if name == "mosaic_tpu":
        from llama_jax.kernels.tpu.paged import paged_attention as run
    elif name == "triton":
        from llama_jax.kernels.gpu.decode_triton import paged_attention as run
    return run(q, k_pages, v_pages, page_table, q_start=q_start)


def resolve(
    implementation: Implementation,
    q: Float[Array, "B T N H"],
    k: Slots,
    *,
    q_start: Int[Array, " B"] | None = None,
) -> Implementation:
    """The name of the implementation that `attention` would use, by the same rules."""
    return _named(implementation, _asked(q, k, q_start))


def _asked(q: Array, k: Slots | Pages, q_start: Array | None) -> Asked:
    return Asked(
        dtype=q.dtype,
        head_dim=q.shape[3],
        queries=q.shape[1],
        slots=k.shape[2],
        group=q.shape[2] // k.shape[1],
        cached=q_start is not None,
        quantized=isinstance(k, QuantizedSlots),
    )


def _named(implementation: Implementation, asked: Asked) -> Implementation:
    if implementation == "auto":
        return choose(asked).implementation
    check(implementation, asked)
    return implementation


def _many(name: Implementation) -> Callable[..., Array]:
    """The function for many queries. Pallas is imported only where it is used."""
    if name == "mosaic_tpu":
        from llama_jax.kernels.tpu import flash as flash_tpu

        return flash_tpu.flash_attention
    if name == "mosaic_gpu":
        from llama_jax.kernels.gpu import flash_mosaic as flash_mosaic_gpu

        return flash_mosaic_gpu.flash_attention
    if name == "triton":
        from llama_jax.kernels.gpu import flash_triton

        return flash_triton.flash_attention
    from llama_jax.kernels.gpu import cudnn

    return cudnn.cudnn_attention


def _decoder(name: Implementation) -> Callable[..., Array]:
    """The function for few queries over a cache."""
    if name == "mosaic_tpu":
        from llama_jax.kernels.tpu import decode as decode_tpu

        return decode_tpu.decode_attention
    from llama_jax.kernels.gpu import decode_triton

    return decode_triton.decode_attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(
    run: Callable[..., Array], q: Any, k: Slots, v: Slots, q_start: Any
) -> Array:
    """Few queries over a cache; nobody trains so, but who asks gets the derivative."""
    return run(q, k, v, q_start=q_start)


def _decode_forward(
    run: Callable[..., Array], q: Any, k: Slots, v: Slots, q_start: Any
) -> tuple[Array, Any]:
    return run(q, k, v, q_start=q_start), (q, k, v, q_start)


def _decode_backward(run: Callable[..., Array], kept: Any, d_out: Array) -> Any:
    def again(q: Any, k: Slots, v: Slots, q_start: Any) -> Array:
        return reference.attention(q, k, v, q_start=q_start)

    return jax.vjp(again, *kept)[1](d_out)


_decode.defvjp(_decode_forward, _decode_backward)
