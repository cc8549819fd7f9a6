"""`python -m llama_jax.finetune`: train a model, a tokenizer, or merge adapters.

    python -m llama_jax.finetune --checkpoint DIR --data FILE --output DIR
    python -m llama_jax.finetune --checkpoint DIR --data FILE --output DIR --method lora
    python -m llama_jax.finetune --output DIR --resume
    python -m llama_jax.finetune merge --checkpoint DIR --adapter DIR --output DIR
    python -m llama_jax.finetune tokenizer --data FILE --vocab-size V --output DIR

Everything but the rows of --show-batch is printed on standard error.
"""

import argparse
import contextlib
import dataclasses
import datetime
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

from llama_jax.checkpoint.model_folder import read_tokenizer
from llama_jax.cli import command as cli
from llama_jax.cli import finetune_flags as flags
from llama_jax.cli.output import print_format_note
from llama_jax.cli.parser import ArgumentParser, refuse_unused
from llama_jax.cli.processes import start_processes
from llama_jax.cli.progress import TerminalReporter, stop_on_signals
from llama_jax.config import LlamaConfig
from llama_jax.data.loader import Loader
from llama_jax.data.show import show
from llama_jax.data.stream import Statistics
from llama_jax.data.vocabulary import train_tokenizer
from llama_jax.distributed import broadcast_from_main, share_of_rows
from llama_jax.errors import ConfigError, TokenizerError, TrainError
from llama_jax.loading import Opened, default_runtime, open_model
from llama_jax.model.extended_context import extend_context
from llama_jax.model.presets import parse_model
from llama_jax.planning.flops import forward_flops, train_flops
from llama_jax.planning.topology import local_topology
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.sharding import axes_size, make_mesh, parse_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.adapters import merge_checkpoint
from llama_jax.train.finetune_config import FinetuneConfig
from llama_jax.train.methods import Method, train_adapters, train_weights
from llama_jax.train.reporter import Sample
from llama_jax.train.run import RunResult, run
from llama_jax.train.run_folder import find_run
from llama_jax.train.samples import complete_prompts
from llama_jax.train.state import TrainState
from llama_jax.types import Mesh


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
    # Before the processes connect, and so before one of them writes there.
    saved = None if output is None else find_run(output, resume=args.resume)
    settings = FinetuneConfig.resumed(
        {} if saved is None else saved.settings, vars(args)
    )
    if not settings.get("data"):
        raise TrainError(
            f"{output}: there is no run to resume; give --data to start one"
        )
    config = FinetuneConfig.from_settings(settings)
    refuse_unused(flags.RULES, args.given, config)
    args.mesh = config.mesh
    resume = f"python -m llama_jax.finetune --resume --output {output}"
    start_processes(args, resume=None if output is None else resume)
    mesh = make_mesh(parse_mesh(config.mesh)) if config.mesh else None
    opened = find_model(config)
    config = config.for_model(opened.config, default_runtime().dtype)
    with contextlib.ExitStack() as stack:
        if config.date is None:  # the same in all processes
            today = broadcast_from_main(datetime.date.today().toordinal())
            date = datetime.date.fromordinal(today).isoformat()
            config = dataclasses.replace(config, date=date)
        loader = stack.enter_context(open_data(config, opened.tokenizer, mesh))
        if config.format != loader.format:
            config = dataclasses.replace(config, format=loader.format)
            print(f"data: format {config.format}", file=sys.stderr)
        print_format_note(opened.tokenizer, config.format)
        if args.show_batch:
            batch, colour = next(loader), sys.stdout.isatty()
            rows = show(batch, opened.tokenizer, rows=args.show_batch, colour=colour)
            print("\n".join(rows))
            return 0
        assert output is not None
        check_rows(config, mesh)
        held_out = None
        if config.eval_data:
            held_out = stack.enter_context(
                open_data(config, opened.tokenizer, mesh, held_out=True)
            )
        steps = config.steps or (None if saved else count_steps(config, loader))
        result = run_training(
            config, opened, mesh, loader, held_out, output, steps, resume=args.resume
        )
    print_result(result, output)
    return 0


def run_training(
    config: FinetuneConfig,
    opened: Opened,
    mesh: Mesh | None,
    loader: Loader,
    held_out: Loader | None,
    output: pathlib.Path,
    steps: int | None,
    *,
    resume: bool,
) -> RunResult:
    """Train, and report on standard error."""
    method, tokenizer = make_method(config, opened, mesh), opened.tokenizer
    prompts = config.sample_prompt

    def sample(state: TrainState) -> list[Sample]:
        loaded = method.for_generation(state.params, tokenizer)
        return complete_prompts(
            loaded, prompts or (), config.format, config.sample_tokens
        )

    def dropped() -> Mapping[str, str]:
        counts = loader.statistics
        return {"records": counts.left_out} if counts.dropped else {}

    flops_per_step, peak_flops = count_flops(config, method)
    return run(
        config,
        method,
        loader,
        output,
        resume=resume,
        total_steps=steps,
        eval_batches=held_out,
        tokenizer=tokenizer,
        sample=sample if prompts else None,
        describe=lambda _: loader.facts(),
        reporter=TerminalReporter(held_out),
        signals=stop_on_signals,
        flops_per_step=flops_per_step,
        peak_flops=peak_flops,
        report_facts=dropped,
    )


def find_model(config: FinetuneConfig) -> Opened:
    """Find the model to start from; one from scratch has no leaves.

    Raises:
      TokenizerError: a model from scratch has no tokenizer, or one that does not fit.
    """
    if config.from_scratch:
        opened = start_from_scratch(config)
    else:
        opened = open_model(
            config.checkpoint,
            tokenizer=config.tokenizer,
            max_seq_len=config.original_max_seq_len,
        )
    return opened._replace(config=with_positions(opened.config, config))


def with_positions(model: LlamaConfig, config: FinetuneConfig) -> LlamaConfig:
    """The model with the rotary positions of the run."""
    if config.rope_theta is not None:
        model = model.replace(rope_theta=config.rope_theta)
    if config.rope_scaling is not None:
        model = extend_context(model, config.rope_scaling, config.max_seq_len)
    return model


def start_from_scratch(config: FinetuneConfig) -> Opened:
    """The shape and the tokenizer of a model that has no weights yet."""
    model = parse_model(config.preset or "", config.seq_length or 2048)
    if config.original_max_seq_len:
        model = model.replace(max_seq_len=config.original_max_seq_len)
    path = pathlib.Path(config.tokenizer or config.checkpoint or "")
    tokenizer = None
    if config.tokenizer or config.checkpoint:
        tokenizer = read_tokenizer(path) if path.is_dir() else Tokenizer.from_file(path)
    if tokenizer is None:
        raise TokenizerError(
            "--from-scratch: there is no tokenizer; give --tokenizer, a file or folder "
            "with one (`python -m llama_jax.finetune tokenizer` trains one)"
        )
    tokenizer.check_fits(model.vocab_size)
    return Opened(model, tokenizer, {})


def open_data(
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    mesh: Mesh | None,
    *,
    held_out: bool = False,
) -> Loader:
    """Open the training data, or the held-out data, which is read once in order."""
    assert config.seq_length is not None
    assert config.date is not None
    index, count = share_of_rows(mesh)
    return Loader(
        (config.eval_data or ()) if held_out else config.data,
        tokenizer,
        format=config.format,
        batch_size=config.batch_size,
        length=config.seq_length,
        packing=config.packing,
        epochs=1 if held_out else config.epochs,
        seed=config.seed,
        shuffle=not held_out,
        on_bad=config.on_bad,
        on_long=config.on_long,
        infilling_rate=config.infilling_rate,
        now=datetime.datetime.fromisoformat(config.date),
        process_index=index,
        process_count=count,
    )


def check_rows(config: FinetuneConfig, mesh: Mesh | None) -> None:
    """Raise a `ConfigError` if the mesh does not divide the rows of a step."""
    if mesh is None:
        return
    axes = dict(TRAINING_RULES.activations)["B"]
    ways, rows = axes_size(mesh, axes), config.batch_size // config.accumulate
    if rows % ways:
        raise ConfigError(
            f"--batch-size {config.batch_size} in --accumulate {config.accumulate} "
            f"parts has {rows} rows at a time, which the {ways} devices of the mesh's "
            f"{' and '.join(axes)} axes cannot share equally; change one of them"
        )


def count_steps(config: FinetuneConfig, loader: Loader) -> int:
    """Read the data once, print its statistics, and estimate the steps of the run."""
    assert config.epochs is not None
    statistics = loader.survey()
    for line in describe_data(statistics):
        print(line, file=sys.stderr)
    return max(math.ceil(config.epochs * statistics.rows / config.batch_size), 1)


def describe_data(statistics: Statistics) -> Iterator[str]:
    """Lines on the contents of an epoch."""
    examples = ", such as" if statistics.problems else ""
    yield (
        f"data: {statistics.records:,} records in {statistics.rows:,} rows, "
        f"{statistics.tokens:,} tokens ({statistics.targets:,} targets), "
        f"{statistics.fill_rate:.1%} filled; {statistics.left_out}{examples}"
    )
    for problem in statistics.problems[:3]:
        yield f"  {problem}"


def make_method(config: FinetuneConfig, opened: Opened, mesh: Mesh | None) -> Method:
    """Make the method: all weights, or adapters."""
    assert config.dtype is not None
    runtime = Runtime(dtype=config.dtype, remat=config.remat, rules=TRAINING_RULES)
    lora = config.lora
    if lora is None:
        return train_weights(
            opened.config,
            runtime.replace(param_dtype=config.param_dtype),
            mesh=mesh,
            opened=opened,
            seed=config.seed,
        )
    return train_adapters(
        opened,
        runtime,
        lora,
        mesh=mesh,
        quantize=config.quantize,
        dtype=config.param_dtype,
        seed=config.seed,
        base_model=config.checkpoint,
    )


def count_flops(config: FinetuneConfig, method: Method) -> tuple[float, float]:
    """Count the FLOPs of a step and the peak FLOP/s of the devices (0 if unknown)."""
    assert config.seq_length is not None
    model = method.model
    flops = train_flops(model.config, config.batch_size, config.seq_length)
    if method.lora is not None:  # frozen weights have no gradient
        flops -= forward_flops(model.config, config.batch_size, config.seq_length)
    peak = local_topology().chip.flops.get(model.runtime.dtype, 0.0)
    return flops, peak * (1 if model.mesh is None else model.mesh.size)


def print_result(result: RunResult, output: pathlib.Path) -> None:
    """Print where the result of a run is, or how to resume it."""
    if result.status == "stopped":
        text = (
            f"stopped after step {result.step}; resume with: python -m "
            f"llama_jax.finetune --resume --output {output}"
        )
    elif result.status == "complete":
        text = f"{output}: this run is finished; see its {result.path.name}"
    else:
        files = ", ".join(file.name for file in result.report)
        text = f"{output}: {result.path.name}, metrics.jsonl, {files}"
        if not any(file.suffix == ".png" for file in result.report):
            text += '\nfor loss.png: pip install "llama-jax[plots]"'
    print(text, file=sys.stderr, flush=True)


def merge(argv: Sequence[str]) -> int:
    """`finetune merge`: write a model with its adapters merged into the weights."""
    parser = ArgumentParser(
        prog="python -m llama_jax.finetune merge",
        description="Merge adapters into the weights of their model, and write it to a "
        "new folder, in the dtype of the base model: to export it, and because it is "
        "faster.",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="base model: any that `sample` loads (default: the bundled story model)",
    )
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="DIR",
        help="adapter/ of a run, or an adapter of peft",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="instead of the base model's"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    args = parser.parse_args(argv)
    merge_checkpoint(
        args.checkpoint, args.adapter, args.output, tokenizer=args.tokenizer
    )
    print(f"{args.output}: merged", file=sys.stderr)
    return 0


def make_tokenizer(argv: Sequence[str]) -> int:
    """`finetune tokenizer`: train a SentencePiece tokenizer."""
    parser = ArgumentParser(
        prog="python -m llama_jax.finetune tokenizer",
        description="Train a SentencePiece tokenizer with the settings of Llama's.",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text to train on: .jsonl, .json, .parquet or .txt, all but Parquet also "
        "with .gz",
    )
    parser.add_argument(
        "--vocab-size",
        type=cli.positive_int,
        default=32_000,
        metavar="V",
        help="number of pieces, 259 of which are bytes and control pieces (default: "
        "32000)",
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder for tokenizer.model"
    )
    args = parser.parse_args(argv)
    file = pathlib.Path(args.output) / "tokenizer.model"
    tokenizer = train_tokenizer(args.data, file, vocab_size=args.vocab_size)
    print(f"{file}: {tokenizer.vocab_size:,} pieces", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
