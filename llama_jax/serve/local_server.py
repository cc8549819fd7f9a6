"""A server of models of this process."""

import dataclasses
from typing import Any

from llama_jax.arguments import checked
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import ServeError
from llama_jax.serve.api.call import Served
from llama_jax.serve.local_engine import LocalEngine
from llama_jax.serve.models import system_fingerprint
from llama_jax.serve.server import Server
from llama_jax.serve.settings import ServeConfig


@checked(ServeError)
def start(
    loaded: Loaded,
    *,
    name: str = "llama_jax",
    format: str | None = None,
    engine: Any = None,
    **settings: Any,
) -> Server:
    """Serve a model from this process, in threads of its own.

    Args:
      loaded: model with unrolled layers, weights and tokenizer.
      name: of the model in requests.
      format: prompt format of chats; defaults to the checkpoint's.
      engine: an `EngineConfig`; defaults to `EngineConfig()`.
      **settings: fields of `ServeConfig`; the port defaults to a free one.

    Returns:
      The server, which listens at `.url`.

    Raises:
      ServeError: a package is missing, or the port cannot be opened.

    >>> import json, urllib.request, llama_jax.serve
    >>> with llama_jax.serve.start(llama_jax.load()) as server:
    ...     with urllib.request.urlopen(f"{server.url}/v1/models") as response:
    ...         json.load(response)["data"][0]["id"]
    'llama_jax'
    """
    config = ServeConfig(**{"port": 0, **settings})
    server = Server(
        [serve_model(loaded, name=name, format=format, engine=engine)], config
    )
    server.start()
    return server


def serve_model(
    loaded: Loaded, *, name: str, format: str | None = None, engine: Any = None
) -> tuple[Served, LocalEngine]:
    """Start the engine of a model.

    Args:
      loaded: model with unrolled layers, weights and tokenizer.
      name: of the model in requests.
      format: prompt format of chats; defaults to the checkpoint's.
      engine: an `EngineConfig`.

    Raises:
      ConfigError: the configuration does not fit the model.
    """
    made = LocalEngine(loaded, engine)
    context = made.config.context or loaded.model.config.max_seq_len
    fingerprint = system_fingerprint(loaded, dataclasses.asdict(made.config))
    return Served(name, loaded.tokenizer, context, fingerprint, format), made
