"""`python -m llama_jax.finetune`: train a model, a tokenizer, or merge adapters.

    python -m llama_jax.finetune --checkpoint DIR --data FILE --output DIR
    python -m llama_jax.finetune --checkpoint DIR --data FILE --output DIR --method lora
    python -m llama_jax.finetune --output DIR --resume
    python -m llama_jax.finetune merge --checkpoint DIR --adapter DIR --output DIR
    python -m llama_jax.finetune tokenizer --data FILE --vocab-size V --output DIR

Everything but --show-batch is told on standard error.
"""

import argparse
import contextlib
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.checkpoint.json_files import write_json
from llama_jax.checkpoint.model_folder import read_tokenizer
from llama_jax.cli import command as cli
from llama_jax.cli import finetune_flags as flags
from llama_jax.cli.finetune_settings import (
    RUN,
    arguments,
    complete,
    read_run,
    taken_over,
)
from llama_jax.cli.trainer import Trainer
from llama_jax.config import LlamaConfig
from llama_jax.data.loader import Loader
from llama_jax.data.show import show
from llama_jax.data.stream import Statistics
from llama_jax.data.vocabulary import train_tokenizer
from llama_jax.distributed import barrier, is_main, share_of_rows
from llama_jax.errors import ConfigError, TokenizerError, TrainError
from llama_jax.loading import Opened, default_runtime, open_model
from llama_jax.model.lora import Lora
from llama_jax.presets import parse_model
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.sharding import axes_size, make_mesh, parse_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.adapters import merge_checkpoint
from llama_jax.train.methods import Method, fingerprint, train_adapters, train_weights


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["tokenizer"]:
        return make_tokenizer(argv[1:])
    if argv[:1] == ["merge"]:
        return merge(argv[1:])
    return train(flags.parse(argv))


def train(args: argparse.Namespace) -> int:
    """Train a model as the flags say."""
    output = None if args.output is None else pathlib.Path(args.output)
    # Before the processes meet, and so before one of them writes there.
    before = None if output is None else check_output(output, resume=args.resume)
    if before is not None:
        taken_over(args, before["arguments"])
    elif not args.data:
        raise TrainError(f"{output}: there is no run to resume; give --data to begin")
    cli.start_processes(args)
    mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
    opened, config = find_model(args)
    complete(args, config)
    runtime = default_runtime() if args.dtype is None else Runtime(dtype=args.dtype)
    args.dtype = runtime.dtype
    runtime = runtime.replace(remat=args.remat, rules=TRAINING_RULES)
    with contextlib.ExitStack() as stack:
        own = share_of_rows(mesh)
        loader = stack.enter_context(open_data(args, opened.tokenizer, own))
        if args.show_batch:
            colour = sys.stdout.isatty()
            rows = show(
                next(loader), opened.tokenizer, rows=args.show_batch, colour=colour
            )
            print("\n".join(rows))
            return 0
        assert output is not None
        if mesh is not None:
            check_rows(args, mesh, runtime)
        held_out = None
        if args.eval_data:
            held_out = stack.enter_context(
                open_data(args, opened.tokenizer, own, held_out=True)
            )
        run = begin(args, output, before, opened, config, loader)
        method = make_method(args, opened, config, runtime, mesh)
        tokenizer = opened.tokenizer
        return Trainer(
            args, output, run, method, tokenizer, loader, held_out, mesh
        ).train()


def check_output(output: pathlib.Path, *, resume: bool) -> dict[str, Any] | None:
    """What is there to be resumed.

    Raises:
      TrainError: there is something, and it is not to be resumed or is no run.
    """
    used = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if used and not resume:
        raise TrainError(
            f"{output}: already exists and is not empty; name a new folder, or --resume"
        )
    before = read_run(output)
    if used and before is None:
        raise TrainError(f"{output}: is not a run's folder (it has no {RUN})")
    return before


def find_model(args: argparse.Namespace) -> tuple[Opened, LlamaConfig]:
    """The model to begin with; of one from scratch there are no leaves.

    Raises:
      TokenizerError: a model from scratch has no tokenizer, or one that does not fit.
    """
    if not args.from_scratch:
        opened = open_model(
            args.checkpoint, tokenizer=args.tokenizer, max_seq_len=args.max_seq_len
        )
        config = opened.config
    else:
        config = parse_model(args.preset, args.seq_length or 2048)
        if args.max_seq_len:
            config = config.replace(max_seq_len=args.max_seq_len)
        named = pathlib.Path(args.tokenizer or args.checkpoint or "")
        tokenizer = None
        if args.tokenizer or args.checkpoint:
            tokenizer = (
                read_tokenizer(named) if named.is_dir() else Tokenizer.from_file(named)
            )
        if tokenizer is None:
            raise TokenizerError(
                "--from-scratch needs --tokenizer, a file or folder with one; `python "
                "-m llama_jax.finetune tokenizer` trains one"
            )
        tokenizer.check_fits(config.vocab_size)
        opened = Opened(config, tokenizer, {})
    if args.rope_theta is not None:
        config = config.replace(rope_theta=args.rope_theta)
        opened = opened._replace(config=config)
    return opened, config


def open_data(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    share: tuple[int, int],
    *,
    held_out: bool = False,
) -> Loader:
    """The batches to learn from, or those to measure with, once in their order."""
    index, count = share
    return Loader(
        args.eval_data if held_out else args.data,
        tokenizer,
        format=args.format,
        batch_size=args.batch_size,
        length=args.seq_length,
        packing=args.packing,
        epochs=1 if held_out else args.epochs,
        seed=args.seed,
        shuffle=not held_out,
        on_bad=args.on_bad,
        on_long=args.on_long,
        infilling_rate=args.infilling_rate,
        process_index=index,
        process_count=count,
    )


def check_rows(args: argparse.Namespace, mesh: Any, runtime: Runtime) -> None:
    """Refuse a batch that the mesh does not divide.

    Raises:
      ConfigError: naming both.
    """
    names = dict(runtime.rules.activations)["B"]
    ways, rows = axes_size(mesh, names), args.batch_size // args.accumulate
    if rows % ways:
        raise ConfigError(
            f"--batch-size {args.batch_size} in --accumulate {args.accumulate} parts "
            f"has {rows} rows at a time, which the {ways} devices of the mesh's "
            f"{' and '.join(names)} axes cannot share equally"
        )


def begin(
    args: argparse.Namespace,
    output: pathlib.Path,
    before: Mapping[str, Any] | None,
    opened: Opened,
    config: LlamaConfig,
    loader: Loader,
) -> dict[str, Any]:
    """What the run says about itself, written where it is new.

    Raises:
      TrainError: the run that is resumed had another model.
    """
    weights = fingerprint(opened.leaves) if opened.leaves else None
    if before is not None:
        model = LlamaConfig.from_dict(before["model"])
        if model != config or before["weights"] != weights:
            raise TrainError(
                f"--checkpoint is not the model that the run in {output} was begun "
                "with; name that one, or begin anew in another --output"
            )
        return dict(before)
    steps = args.steps
    if steps is None:
        found = loader.survey()
        steps = max(math.ceil(args.epochs * found.rows / args.batch_size), 1)
        for line in about_data(found):
            print(line, file=sys.stderr)
    run = {
        "version": 1,
        "arguments": arguments(args),
        "steps": steps,
        "model": config.to_dict(),
        "weights": weights,
    }
    if is_main():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN, run)
    barrier("the run has begun")
    return run


def about_data(found: Statistics) -> Iterator[str]:
    """Lines that say what an epoch holds."""
    such_as = ", such as" if found.problems else ""
    yield (
        f"data: {found.records:,} records in {found.rows:,} rows, {found.tokens:,} "
        f"tokens ({found.targets:,} targets), {found.fill_rate:.1%} filled; "
        f"{found.left_out}{such_as}"
    )
    for problem in found.problems[:3]:
        yield f"  {problem}"


def make_method(
    args: argparse.Namespace,
    opened: Opened,
    config: LlamaConfig,
    runtime: Runtime,
    mesh: Any,
) -> Method:
    """What is trained."""
    if args.method == "full":
        return train_weights(
            config,
            runtime.replace(param_dtype=args.param_dtype),
            mesh=mesh,
            opened=opened if opened.leaves else None,
            seed=args.seed,
        )
    lora = Lora(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        targets=tuple(args.lora_targets),
    )
    return train_adapters(
        opened,
        runtime,
        lora,
        mesh=mesh,
        quantize=args.quantize,
        dtype=args.param_dtype,
        seed=args.seed,
    )


def merge(argv: Sequence[str]) -> int:
    """`finetune merge`: a model that needs no adapter any more."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.finetune merge",
        description="Write the model that does what a model with an adapter does: a "
        "folder of ours, in the dtype of the base, for export and for speed.",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="the base: any model that can be loaded (default: the small story model)",
    )
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="adapter/ of a run, or of peft"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="in place of the base's")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    merge_checkpoint(
        args.checkpoint, args.adapter, args.output, tokenizer=args.tokenizer
    )
    print(f"{args.output}: merged", file=sys.stderr)
    return 0


def make_tokenizer(argv: Sequence[str]) -> int:
    """`finetune tokenizer`: SentencePiece with the settings of Llama's own."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.finetune tokenizer",
        description="Train a SentencePiece tokenizer with the settings of Llama's own.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text to learn from: .jsonl, .json, .parquet or .txt, also with .gz",
    )
    parser.add_argument(
        "--vocab-size",
        type=cli.positive,
        default=32_000,
        metavar="V",
        help="pieces, 259 of them bytes and control pieces (default: 32000)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where tokenizer.model goes"
    )
    args = parser.parse_args(argv)
    file = pathlib.Path(args.output) / "tokenizer.model"
    tokenizer = train_tokenizer(args.data, file, vocab_size=args.vocab_size)
    print(f"{file}: {tokenizer.vocab_size:,} pieces", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
