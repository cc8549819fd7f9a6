"""`python -m llama_jax`: list the commands."""

import argparse
import runpy
import sys
from collections.abc import Sequence

from llama_jax.cli.parser import ArgumentParser

COMMANDS = {
    "sample": "complete a text, answer messages or fill a gap",
    "serve": "serve a model over HTTP, with a page",
    "finetune": "train a model or adapters; merge adapters; train a tokenizer",
    "rlhf": "learn from human feedback, in stages",
    "conversion": "convert, compare and describe checkpoints",
    "plan": "whether a model fits, how fast it could be, and where",
    "bench": "measure the library and the machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """List the commands, or run one of them."""
    parser = ArgumentParser(
        prog="python -m llama_jax",
        usage="python -m llama_jax COMMAND ...",
        description="commands (each has its own --help):\n"
        + "\n".join(f"  {name:<12}{purpose}" for name, purpose in COMMANDS.items()),
        epilog="`python -m llama_jax.COMMAND` is the same.",
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    sys.argv[1:] = args.rest
    runpy.run_module(f"llama_jax.{args.command}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
