"""`linear`: the function that multiplies with a projection's weight, in any form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from llama_jax.kernels.precision import matmul_precision
from llama_jax.types import Array, Float
from llama_jax.weights import (
    Adapted,
    Int8,
    Quantized,
    Weight,
    dequantize,
    group_size,
    values_in,
)


def linear(
    x: Float[Array, "*batch I"],
    w: Weight,
    *,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, "*batch O"]:
    """Compute `x @ w` in the dtype of `x`, summed in float32 where the device can.

    Args:
      x: rows.
      w: [I, O]; quantized and adapted ones are multiplied with as they are stored.
        Gradients flow to `x`, to plain weights and to adapters, never to bits.
      out_dtype: of the result; float32 gives the unrounded sum, as for logits.
    """
    if isinstance(w, Adapted):
        low = linear(linear(x, w.a) * w.scaling, w.b, out_dtype=out_dtype)
        return linear(x, w.base, out_dtype=out_dtype) + low
    if isinstance(w, Quantized):
        dtype = jnp.dtype(x.dtype)
        return _quantized(x, w, dtype, jnp.dtype(out_dtype or dtype))
    w = w.astype(x.dtype)
    inputs = w.shape[0]
    if x.size != inputs or inputs % _CPU_BLOCKS:
        return _product(x, w, out_dtype)
    return jax.lax.platform_dependent(
        x,
        w,
        cpu=functools.partial(_product_in_blocks, out_dtype=out_dtype),
        default=functools.partial(_product, out_dtype=out_dtype),
    )


_CPU_BLOCKS = 8
"""Parts in which a product of one row is summed; 4 to 16 are equally fast."""


def _product(x: Array, w: Array, out_dtype: DTypeLike | None) -> Array:
    return jnp.matmul(
        x, w, precision=matmul_precision(x.dtype), preferred_element_type=out_dtype
    )


def _product_in_blocks(x: Array, w: Array, out_dtype: DTypeLike | None) -> Array:
    """Multiply one row as a batch of partial products, and add them up.

    XLA:CPU spreads a batch over the cores better than one matrix-vector product of a
    layer's size: 12 layers of width 768 stream at 20 GB/s instead of 15 on two cores.
    """
    parts = jnp.matmul(
        x.reshape(_CPU_BLOCKS, 1, -1),
        w.reshape(_CPU_BLOCKS, -1, w.shape[1]),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    summed = jnp.sum(parts, axis=0).astype(out_dtype or x.dtype)
    return summed.reshape(*x.shape[:-1], w.shape[1])


_FEW_ROWS = 64
"""Rows from which widening a weight takes no time in comparison with its product."""

_CPU_CHUNK = 32
"""Inputs whose bits are widened at a time; 16 to 128 are nearly as fast."""


# Its gradient saves the bits for the backward pass; autodiff would save the whole
# widened weight.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _quantized(x: Array, w: Quantized, dtype: DTypeLike, out_dtype: DTypeLike) -> Array:
    x, w = _ordered(x, w)
    if x.size > _FEW_ROWS * w.shape[0] or not _chunk(w):
        return _forward(x, w).astype(out_dtype)
    out = jax.lax.platform_dependent(x, w, cpu=_forward_in_chunks, default=_forward)
    return out.astype(out_dtype)


def _quantized_forward(
    x: Array, w: Quantized, dtype: DTypeLike, out_dtype: DTypeLike
) -> tuple[Array, Quantized]:
    return _quantized(x, w, dtype, out_dtype), w


def _quantized_backward(
    dtype: DTypeLike, out_dtype: DTypeLike, w: Quantized, d_out: Array
) -> tuple[Array, None]:
    d_out, w = _ordered(d_out, w)
    if isinstance(w, Int8):
        factor = jnp.ones((), jnp.float32)
        if dtype == jnp.float16:  # in which a gradient times a scale would be lost
            factor = jnp.max(w.scales) + jnp.finfo(jnp.float32).tiny
        scaled = d_out.astype(jnp.float32) * _per_output(w.scales / factor, d_out.ndim)
        weight = values_in(w, dtype)
    else:
        scaled, weight, factor = d_out, dequantize(w, dtype), jnp.ones(())
    d_x = jax.lax.dot_general(
        scaled.astype(dtype),
        weight,
        (((d_out.ndim - 1,), (1,)), ((), ())),
        precision=matmul_precision(dtype),
        preferred_element_type=jnp.float32,
    )
    return (d_x * factor).astype(dtype), None


_quantized.defvjp(_quantized_forward, _quantized_backward)


def _ordered(x: Array, w: Quantized) -> tuple[Array, Quantized]:
    """Delay a weight until its rows exist: XLA:CPU would widen all layers' at once."""

    def wait(*both: Array | Quantized) -> tuple[Array | Quantized, ...]:
        return jax.lax.optimization_barrier(both)

    return jax.lax.platform_dependent(x, w, cpu=wait, default=lambda *both: both)


def _forward(x: Array, w: Quantized) -> Float[Array, "*batch O"]:
    """The product, in float32."""
    if isinstance(w, Int8):
        out = _product(x, values_in(w, x.dtype), jnp.float32)
        return out * _per_output(w.scales, out.ndim)
    return _product(x, dequantize(w, x.dtype), jnp.float32)


def _forward_in_chunks(x: Array, w: Quantized) -> Float[Array, "*batch O"]:
    """The same for few rows, in chunks of inputs that are widened in the CPU's cache.

    XLA:CPU does not fuse widening into a product, but writes the whole weight to
    memory: a row takes 60 ms instead of 16 for 4096 × 11008 numbers in eight bits.
    """
    inputs, outputs = w.shape
    chunk = _chunk(w)
    rows = x.astype(jnp.float32).reshape(-1, inputs // chunk, chunk).swapaxes(0, 1)
    chunks = w.values.reshape(-1, chunk, outputs)
    scales = None
    if not isinstance(w, Int8):
        scales = w.scales.reshape(chunks.shape[0], -1, outputs)

    def add(
        total: Array, piece: tuple[Array, Array, Array | None]
    ) -> tuple[Array, None]:
        row, values, scales = piece
        part = dataclasses.replace(w, values=values, scales=scales)
        if scales is None:
            return total + _product(row, values_in(part, row.dtype), None), None
        return total + _product(row, dequantize(part, row.dtype), None), None

    empty = jnp.zeros((rows.shape[1], outputs), jnp.float32)
    total, _ = jax.lax.scan(add, empty, (rows, chunks, scales))
    if isinstance(w, Int8):
        total = total * _per_output(w.scales, 2)
    return total.reshape(*x.shape[:-1], outputs)


def _per_output(scales: Float[Array, " O"], ndim: int) -> Array:
    """Scales as the last of `ndim` axes."""
    return scales.reshape((1,) * (ndim - 1) + scales.shape)


def _chunk(w: Quantized) -> int:
    """Inputs of a chunk, in whole groups; 0 if none is worth its loop."""
    inputs = w.shape[0]
    group = 1 if isinstance(w, Int8) else inputs // w.scales.shape[0]
    chunk = group * group_size(inputs // group, max(_CPU_CHUNK // group, 1))
    return chunk if 8 <= chunk < inputs else 0
