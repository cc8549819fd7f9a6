"""A server that listens on a port, in a thread of its own or in the caller's."""

import asyncio
import socket
import threading
from collections.abc import Sequence

from llama_jax.errors import ServeError
from llama_jax.serve.api.call import Served
from llama_jax.serve.jobs import Engine
from llama_jax.serve.settings import ServeConfig


class Server:
    """A server that listens; close it, or use it in a `with` statement.

    Args:
      models: names, models, engines and prompt formats; the first is the default.
      config: of the server.

    Attributes:
      url: of the server.

    Raises:
      ServeError: the packages of the extra `serve` are not installed, or the port
        cannot be opened.
    """

    def __init__(
        self, models: Sequence[tuple[Served, Engine]], config: ServeConfig
    ) -> None:
        try:
            import uvicorn

            from llama_jax.serve.app import App
            from llama_jax.serve.models import Models, ServedModel
        except ModuleNotFoundError as error:
            raise ServeError(
                f"serving needs the package {error.name}; "
                "pip install 'llama-jax[serve]'"
            ) from error
        self._config = config
        self._engines = [engine for _, engine in models]
        self._app = App(Models([ServedModel(*model) for model in models]), config)
        self._socket = _listen(config)
        port = self._socket.getsockname()[1]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
        self.url = f"http://{host}:{port}"
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._app.asgi,
                log_config=None,
                lifespan="off",
                ws="none",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(int(config.drain), 1),
            )
        )
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve()),
            name="llama_jax server",
            daemon=True,
        )
        self._thread.start()

    def run(self) -> None:
        """Serve in this thread until `stop` is called, from any thread."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        # `serve` would handle signals, which is the business of the command.
        await self._uvicorn._serve([self._socket])

    def stop(self) -> None:
        """Refuse new requests and end when the accepted ones are answered."""
        self._app.draining = True
        self._uvicorn.should_exit = True

    def close(self) -> None:
        """Stop, wait for the answers, and close the engines."""
        self.stop()
        for engine in self._engines:
            engine.drain(self._config.drain)
            engine.close()
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> "Server":
        """Return the server."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the server."""
        self.close()


def _listen(config: ServeConfig) -> socket.socket:
    """Open the port."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(2048)  # so that clients may connect at once
    except OSError as error:
        listener.close()
        raise ServeError(
            f"port {config.port} of {config.host} cannot be opened "
            f"({error.strerror}); choose another --port"
        ) from error
    return listener
