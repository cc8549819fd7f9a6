"""Attention, in every implementation the library has, and the loss of a batch."""

from llama_jax.kernels.api import attention, paged_attention, resolve
from llama_jax.kernels.choice import Implementation, explain
from llama_jax.kernels.cross_entropy import token_losses
from llama_jax.kernels.quantized import QuantizedSlots, quantize_slots

__all__ = [
    "Implementation",
    "QuantizedSlots",
    "attention",
    "explain",
    "paged_attention",
    "quantize_slots",
    "resolve",
    "token_losses",
]
