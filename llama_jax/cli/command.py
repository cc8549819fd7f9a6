"""What all commands share: the flags of a model, and how a command ends."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, get_args

import jax

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import LlamaJaxError
from llama_jax.loading import default_runtime, load
from llama_jax.runtime import CacheDType, DType
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.weights import Kind

Group = argparse._ArgumentGroup | argparse.ArgumentParser
"""Where flags are added."""


def add_checkpoint_argument(group: Group) -> None:
    """Add --checkpoint."""
    group.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a model: a folder of ours, Meta's or Hugging Face's, a .gguf or a .bin "
        "(default: the small story model that comes with the package)",
    )


def add_model_arguments(group: Group) -> None:
    """Add the other flags that choose a model and how it runs."""
    group.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model or tokenizer.json, if the checkpoint has none",
    )
    group.add_argument(
        "--max-seq-len",
        type=positive_int,
        metavar="N",
        help="context length in tokens (default: the checkpoint's)",
    )
    group.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="dtype of weights and activations (default: float32 on CPUs, bfloat16 "
        "where it is fast, else float16)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help="mesh of devices that share the model, as in data=1,fsdp=-1,tensor=1; -1 "
        "takes the remaining devices (default: one device)",
    )


def add_storage_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose how frozen weights and caches are stored."""
    group = parser.add_argument_group("weights and cache")
    group.add_argument(
        "--adapter",
        metavar="DIR",
        help="LoRA adapters of `python -m llama_jax.finetune` or peft, not merged into "
        "the weights",
    )
    group.add_argument(
        "--quantize",
        choices=get_args(Kind),
        help="store the layers' projections in eight or four bits; on CPUs jax before "
        "0.12 widens those of all layers at once, unless XLA_FLAGS has "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    )
    group.add_argument(
        "--cache-dtype",
        choices=get_args(CacheDType),
        help="store keys and values in eight bits",
    )


def load_model(args: argparse.Namespace) -> Loaded:
    """Load the model that the flags of the two functions above choose."""
    runtime = default_runtime()
    if args.dtype:
        runtime = runtime.replace(dtype=args.dtype)
    if args.cache_dtype:
        runtime = runtime.replace(cache_dtype=args.cache_dtype)
    return load(
        args.checkpoint,
        runtime=runtime,
        mesh=make_mesh(parse_mesh(args.mesh)) if args.mesh else None,
        tokenizer=args.tokenizer,
        max_seq_len=args.max_seq_len,
        quantize=args.quantize,
        adapter=args.adapter,
    )


def positive_int(text: str) -> int:
    """Parse an argument that must be an integer of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def run(
    main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None
) -> NoReturn:
    """Run a command and exit with its status.

    Bad input is one sentence on standard error and status 2, Ctrl-C status 130.

    Args:
      main: takes the arguments and returns the status.
      argv: arguments; defaults to those of the process.
    """
    # Models write Unicode, whatever the locale is.
    for channel in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            channel.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    try:
        status = main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(0)
    except (LlamaJaxError, OSError) as error:
        _end(2, f"error: {error}")
    except KeyboardInterrupt:
        _end(130, "interrupted")
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        _end(
            1,
            f"{traceback.format_exc()}error: this process failed; if a collective "
            "operation did (Gloo, NCCL), see the other processes' output for the cause",
        )
    sys.exit(status)


def _end(status: int, message: str | None = None) -> NoReturn:
    """Say why this process ends before its time, and end it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    if not jax.distributed.is_initialized():
        if message:
            print(message, file=sys.stderr)
        sys.exit(status)
    if message:  # `sys.stderr` discards it in all processes but the main one
        print(message, file=sys.__stderr__, flush=True)
    # JAX ends all others as soon as process 0 is gone; let them print their errors.
    time.sleep(1.0)
    # At a usual exit JAX waits five minutes for the other processes.
    os._exit(status)
