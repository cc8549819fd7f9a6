"""`python -m llama_jax.serve`: load, compile, listen, and end well."""

import argparse
import pathlib
import signal
import sys
import threading
from collections.abc import Sequence

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli import serve_flags
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.local_server import serve_model
from llama_jax.serve.server import Server
from llama_jax.serve.settings import ServeConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = serve_flags.parse(argv)
    config = serve_flags.serve_config(args)
    engine = serve_flags.engine_config(args)
    serve(cli.load_model(args), model_name(args), args.format, engine, config)
    return 0


def model_name(args: argparse.Namespace) -> str:
    """The name of the model in requests."""
    if args.name:
        return str(args.name)
    return (
        pathlib.Path(args.checkpoint).resolve().stem if args.checkpoint else "stories"
    )


def serve(
    loaded: Loaded,
    name: str,
    format: str | None,
    engine: EngineConfig,
    config: ServeConfig,
) -> None:
    """Serve until a signal comes, and answer what was accepted before it."""
    served, made = serve_model(loaded, name=name, format=format, engine=engine)
    print("compiling ...", file=sys.stderr, flush=True)
    seconds = made.compile()
    server = Server([(served, made)], config)
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        stopped.set()
        server.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    print(f"compiled in {seconds:.1f} s", file=sys.stderr)
    print(f"{name} is served at {server.url}", file=sys.stderr, flush=True)
    try:
        server.run()
    finally:
        server.close()
    if stopped.is_set():
        print("all accepted requests are answered", file=sys.stderr)
