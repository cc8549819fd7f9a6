"""Attention, in every implementation the library has, behind one function."""

from llama_jax.kernels.api import attention

__all__ = ["attention"]
