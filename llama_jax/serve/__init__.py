"""Serving: many requests at once, each with the answer that it gets alone."""

from llama_jax.serve.server import Server, start

__all__ = ["Server", "start"]
