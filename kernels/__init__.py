"""Attention in every implementation of the library, and the cross-entropy loss."""

from llama_jax.kernels.dispatch import attention, paged_attention, resolve
from llama_jax.kernels.quantized_slots import QuantizedSlots, quantize_slots
from llama_jax.kernels.selection import Implementation, explain
from llama_jax.kernels.token_loss import GreedyTokens, greedy_tokens, token_losses

__all__ = [
    "GreedyTokens",
    "Implementation",
    "QuantizedSlots",
    "attention",
    "explain",
    "greedy_tokens",
    "paged_attention",
    "quantize_slots",
    "resolve",
    "token_losses",
]
