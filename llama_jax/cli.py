"""What the commands share: flags of the same name and meaning, and how they fail."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, get_args

from llama_jax.checkpoint import Loaded
from llama_jax.errors import LlamaJaxError
from llama_jax.loading import default_runtime, load
from llama_jax.runtime import DType
from llama_jax.sharding import make_mesh, parse_mesh


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model runs, and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a model: a folder of ours, Meta's or Hugging Face's, a .gguf or a .bin "
        "(default: the small story model that comes with the package)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, where none lies with the checkpoint",
    )
    group.add_argument(
        "--max-seq-len",
        type=positive,
        metavar="N",
        help="context in tokens, in place of the checkpoint's own",
    )
    group.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="of weights and activations (default: float32 on CPUs, bfloat16 where it "
        "is fast, else float16)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices to split the model over, as in data=1,fsdp=-1,tensor=1; -1 takes "
        "what is left (default: one device)",
    )


def load_from(args: argparse.Namespace) -> Loaded:
    """The model that the flags of `add_model_arguments` name."""
    runtime = default_runtime()
    if args.dtype:
        runtime = runtime.replace(dtype=args.dtype)
    return load(
        args.checkpoint,
        runtime=runtime,
        mesh=make_mesh(parse_mesh(args.mesh)) if args.mesh else None,
        tokenizer=args.tokenizer,
        max_seq_len=args.max_seq_len,
    )


def positive(text: str) -> int:
    """An argument that must be an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def run(
    main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a command and exit: 2 after one sentence for bad input, 130 after Ctrl-C."""
    # Model output is Unicode whatever the locale says.
    for channel in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            channel.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        status = main(argv)
        sys.stdout.flush()
    except (LlamaJaxError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
