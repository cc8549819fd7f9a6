"""The flags of the server: models, engine, access and limits."""

import argparse
import os
import pathlib
from collections.abc import Sequence

from llama_jax.cli import command as cli
from llama_jax.cli.parser import ArgumentParser
from llama_jax.cli.prompt_files import FORMAT_HELP
from llama_jax.errors import ConfigError
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.serve.settings import ServeConfig

KEY_VARIABLE = "LLAMA_JAX_API_KEY"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="python -m llama_jax.serve",
        description="Serve a model over HTTP, in the protocols of OpenAI's, "
        "Anthropic's and llama.cpp's clients, with a page for people at /.",
        epilog="Without any flag, the small model that comes with the package is "
        "served to this machine alone. Ctrl-C ends the server when all accepted "
        "requests are answered; a second one ends it at once.",
    )
    group = parser.add_argument_group("model")
    cli.add_checkpoint_argument(group)
    cli.add_model_arguments(group)
    group.add_argument(
        "--name",
        metavar="NAME",
        help="of the model in requests (default: the name of the checkpoint's folder)",
    )
    group.add_argument("--format", metavar="NAME", help=FORMAT_HELP)
    cli.add_storage_arguments(parser)
    group = parser.add_argument_group(
        "engine", "An answer's last bits depend on these, and never on the load."
    )
    defaults = EngineConfig()
    for name, text in {
        "lanes": "rows that decode together",
        "chunk": "prompt tokens that are read at once",
        "max-logprobs": "most likeliest tokens that a request may ask for",
        "max-waiting": "most answers in the queue",
    }.items():
        default = getattr(defaults, name.replace("-", "_"))
        group.add_argument(
            f"--{name}",
            type=cli.positive_int,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    group.add_argument(
        "--pages",
        type=int,
        metavar="N",
        help="pages of the cache; 0 gives every lane slots of its own, without reuse "
        "of prefixes (default: enough for all lanes; 0 on a mesh)",
    )
    group = parser.add_argument_group("access and limits")
    server = ServeConfig()
    group.add_argument(
        "--host",
        metavar="ADDRESS",
        default=server.host,
        help=f"address to listen on; 0.0.0.0 is the network (default: {server.host})",
    )
    group.add_argument(
        "--port",
        type=int,
        metavar="N",
        default=server.port,
        help=f"port; 0 takes a free one (default: {server.port})",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file with the key that requests must have (default: the environment's "
        f"{KEY_VARIABLE}, if it is set)",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages of this origin may use the server; may be repeated",
    )
    for name, text in {
        "max-body": "most bytes of a request",
        "max-open": "most requests that are answered or wait",
        "time-limit": "seconds that an answer may take",
        "drain": "seconds that accepted requests have when the server ends",
    }.items():
        default = getattr(server, name.replace("-", "_"))
        group.add_argument(
            f"--{name}",
            type=cli.positive_int,
            default=int(default),
            metavar="N",
            help=f"{text} (default: {default:g})"
            if isinstance(default, float)
            else f"{text} (default: {default})",
        )
    return parser.parse_args(argv)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """Make the engine's configuration."""
    pages = 0 if args.pages is None and args.mesh else args.pages
    return EngineConfig(
        lanes=args.lanes,
        chunk=args.chunk,
        pages=pages,
        max_logprobs=args.max_logprobs,
        max_waiting=args.max_waiting,
    )


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """Make the server's configuration.

    Raises:
      ConfigError: a setting is out of range, or the key cannot be read.
    """
    return ServeConfig(
        host=args.host,
        port=args.port,
        api_key=_api_key(args.api_key_file),
        origins=tuple(args.allow_origin),
        max_body=args.max_body,
        max_open=args.max_open,
        time_limit=float(args.time_limit),
        drain=float(args.drain),
    )


def _api_key(file: str | None) -> str | None:
    """The key: of a file or of the environment, since all users see command lines."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        return pathlib.Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file: cannot read {file}: {error}") from error
