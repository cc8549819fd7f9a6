"""Serving: many requests at once, each with the answer that it gets alone."""

from llama_jax.serve.local_server import start
from llama_jax.serve.server import Server

__all__ = ["Server", "start"]
