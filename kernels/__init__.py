"""Attention, in every implementation the library has, and the loss of a batch."""

from llama_jax.kernels.api import attention
from llama_jax.kernels.cross_entropy import token_losses

__all__ = ["attention", "token_losses"]
