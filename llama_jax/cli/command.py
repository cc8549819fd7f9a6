"""What the commands share: flags of the same name and meaning, and how they fail."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, get_args

from llama_jax import distributed
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.errors import LlamaJaxError, ProcessError
from llama_jax.loading import default_runtime, load
from llama_jax.runtime import CacheDType, DType
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.weights import Kind


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


def add_holding_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how weights that are not trained and caches are held."""
    group = parser.add_argument_group("weights and cache")
    group.add_argument(
        "--adapter",
        metavar="DIR",
        help="LoRA adapters of `python -m llama_jax.finetune` or of peft, which stay "
        "beside the weights",
    )
    group.add_argument(
        "--quantize",
        choices=get_args(Kind),
        help="hold the layers' projections in eight or four bits; on CPUs jax before "
        "0.12 widens those of all layers at once, unless XLA_FLAGS has "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    )
    group.add_argument(
        "--cache-dtype",
        choices=get_args(CacheDType),
        help="hold keys and values of what was read and written in eight bits",
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a run over several processes; `start_processes` reads them."""
    group = parser.add_argument_group(
        "several processes",
        "Each is started with the same arguments and a number of its own. On a TPU pod "
        "and under srun they find each other without these flags. Needs --mesh.",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="where process 0 listens, as the others see it",
    )
    group.add_argument(
        "--num-processes", type=int, metavar="N", help="how many there are"
    )
    group.add_argument(
        "--process-id", type=int, metavar="I", help="which this one is, from 0"
    )


def start_processes(args: argparse.Namespace) -> bool:
    """Find the other processes, if there are any; only process 0 prints from then on.

    To be called before anything of JAX's. What commands write goes to `sys.stdout` and
    `sys.stderr`, which lead nowhere in all processes but 0. Errors are seen of all.

    Returns:
      Whether there are others.
    """
    several = distributed.initialize(
        args.coordinator, args.num_processes, args.process_id, environ=os.environ
    )
    if not several:
        return False
    if args.mesh is None:
        raise ProcessError(
            "several processes need --mesh, which says how they share the model, as "
            "in --mesh fsdp=-1"
        )
    sys.stdout.flush()
    if distributed.is_main():
        # Libraries in C++ write to standard output, which is for results.
        results = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = os.fdopen(results, "w", encoding="utf-8", errors="replace")
    else:
        os.dup2(2, 1)
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return True


def load_from(args: argparse.Namespace) -> Loaded:
    """The model that the flags of the two functions above name."""
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
        status = _say_and_end(f"error: {error}", error, 2)
    except KeyboardInterrupt as error:
        status = _say_and_end("interrupted", error, 130)
    except Exception as error:
        if distributed.place()[1] > 1:
            sys.stderr = sys.__stderr__  # where the traceback is seen
            traceback.print_exc()
            distributed.fail(error)
        raise
    sys.exit(status)


def _say_and_end(text: str, error: BaseException, status: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    print(text, file=sys.__stderr__ if distributed.place()[1] > 1 else sys.stderr)
    distributed.fail(error, status)
    return status
