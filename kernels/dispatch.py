"""`attention` and `paged_attention`, which run the selected implementation."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
from jaxtyping import Array, Float, Int

from llama_jax.kernels import reference
from llama_jax.kernels.quantized_slots import QuantizedSlots, dequantize_slots
from llama_jax.kernels.reference import Pages, Slots
from llama_jax.kernels.selection import AttentionCall, Implementation, check, select

DecodeInputs: TypeAlias = tuple[Array, Slots, Slots, Array | None]


def attention(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    *,
    q_start: Int[Array, " B"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """Compute causal grouped-query attention, softmax(q·kᵀ/√H)·v.

    A query attends to the slots up to its own; query head n reads key/value head
    n // (N / K).

    Args:
      q: queries.
      k: keys, `[B, K, S, H]` (heads before slots) or int8 `QuantizedSlots`.
      v: values, like `k`.
      q_start: slot of each row's first query; defaults to 0.
      segment_ids: segments of packed rows (S = T); a query attends within its own.
      implementation: `"auto"` selects the best one that works on JAX's first device
        (`explain` says which, and why). `"xla"` is plain array operations, works
        everywhere, and is the specification. `"mosaic_tpu"`, `"mosaic_gpu"` (Hopper)
        and `"triton"` are Pallas kernels, `"cudnn"` is NVIDIA's. A named
        implementation never falls back to another.

    Returns:
      The output, in the dtype of `q`.

    Raises:
      ValueError: the implementation does not exist, or does not support the call.

    Example:
      >>> import jax
      >>> from llama_jax.kernels import attention
      >>> q = jax.random.normal(jax.random.key(0), (1, 5, 4, 16))  # B T N H
      >>> k = v = jax.random.normal(jax.random.key(1), (1, 2, 5, 16))  # B K S H
      >>> attention(q, k, v).shape
      (1, 5, 4, 16)
    """
    call = _call_of(q, k, q_start)
    name = _resolve(implementation, call)
    if name == "xla":
        return reference.attention(q, k, v, q_start=q_start, segment_ids=segment_ids)
    if call.decoding and segment_ids is None and name in ("mosaic_tpu", "triton"):
        return _decode(_decoding_kernel(name), q, k, v, q_start)
    k, v = dequantize_slots(k, q.dtype), dequantize_slots(v, q.dtype)
    return _flash_kernel(name)(q, k, v, q_start=q_start, segment_ids=segment_ids)


def paged_attention(
    q: Float[Array, "B T N H"],
    k_pages: Pages,
    v_pages: Pages,
    page_table: Int[Array, "B M"],
    *,
    q_start: Int[Array, " B"],
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """Compute `attention` over a paged cache, whose pages hold C slots in any order.

    Args:
      q: queries, few per row.
      k_pages: pages of keys, `[P, K, C, H]` or int8 `QuantizedSlots`; shared by all
        rows.
      v_pages: pages of values, like `k_pages`.
      page_table: pages of each row; slot s is in page `page_table[row, s // C]`.
        Entries after a row's last slot are not used, but must be valid.
      q_start: slot of each row's first query.
      implementation: see `attention`; `"cudnn"` and `"mosaic_gpu"` do not support
        paged caches.

    Returns:
      The output, in the dtype of `q`.

    Raises:
      ValueError: the implementation does not exist, or does not support the call.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from llama_jax.kernels import paged_attention
      >>> q = jax.random.normal(jax.random.key(0), (1, 1, 4, 16))  # B T N H
      >>> pages = jax.random.normal(jax.random.key(1), (3, 2, 8, 16))  # P K C H
      >>> table, last = jnp.array([[2, 0]]), jnp.array([11])
      >>> paged_attention(q, pages, pages, table, q_start=last).shape
      (1, 1, 4, 16)
    """
    call = _call_of(q, k_pages, q_start)._replace(paged=True)
    name = _resolve(implementation, call)
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
    """Return the name of the implementation that `attention` uses for these arguments.

    Raises:
      ValueError: the implementation does not exist, or does not support the call.
    """
    return _resolve(implementation, _call_of(q, k, q_start))


def _call_of(q: Array, k: Slots | Pages, q_start: Array | None) -> AttentionCall:
    return AttentionCall(
        dtype=q.dtype,
        head_dim=q.shape[3],
        queries=q.shape[1],
        slots=k.shape[2],
        group=q.shape[2] // k.shape[1],
        cached=q_start is not None,
        quantized=isinstance(k, QuantizedSlots),
    )


def _resolve(implementation: Implementation, call: AttentionCall) -> Implementation:
    if implementation == "auto":
        return select(call).implementation
    check(implementation, call)
    return implementation


def _flash_kernel(name: Implementation) -> Callable[..., Array]:
    """The function for many queries; imported on use, as Pallas imports slowly."""
    if name == "mosaic_tpu":
        from llama_jax.kernels.tpu import flash

        return flash.flash_attention
    if name == "mosaic_gpu":
        from llama_jax.kernels.gpu import flash_mosaic

        return flash_mosaic.flash_attention
    if name == "triton":
        from llama_jax.kernels.gpu import flash_triton

        return flash_triton.flash_attention
    from llama_jax.kernels.gpu import cudnn

    return cudnn.cudnn_attention


def _decoding_kernel(name: Implementation) -> Callable[..., Array]:
    """The function for few queries over a cache."""
    if name == "mosaic_tpu":
        from llama_jax.kernels.tpu import decode

        return decode.decode_attention
    from llama_jax.kernels.gpu import decode_triton

    return decode_triton.decode_attention


# The decoding kernels have no backward pass; a gradient is the reference's.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(
    run: Callable[..., Array], q: Array, k: Slots, v: Slots, q_start: Array | None
) -> Array:
    return run(q, k, v, q_start=q_start)


def _decode_forward(
    run: Callable[..., Array], q: Array, k: Slots, v: Slots, q_start: Array | None
) -> tuple[Array, DecodeInputs]:
    inputs = q, k, v, q_start
    return _decode(run, *inputs), inputs


def _decode_backward(
    run: Callable[..., Array], inputs: DecodeInputs, d_out: Array
) -> DecodeInputs:
    def attend(q: Array, k: Slots, v: Slots, q_start: Array) -> Array:
        return reference.attention(q, k, v, q_start=q_start)

    return jax.vjp(attend, *inputs)[1](d_out)


_decode.defvjp(_decode_forward, _decode_backward)
