"""What `rlhf reward` and `rlhf dpo` share: their flags, and a run on preferences."""

import argparse
import dataclasses
import datetime
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, get_args

import numpy as np

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli import prompt_files
from llama_jax.cli.output import print_format_note
from llama_jax.cli.parser import ArgumentParser, Rules, excludes, needs, refuse_unused
from llama_jax.cli.progress import TerminalReporter, stop_on_signals
from llama_jax.cli.run_flags import (
    add_lora_arguments,
    add_output_arguments,
    add_training_arguments,
)
from llama_jax.data.files import Corpus
from llama_jax.data.records import OnBad
from llama_jax.errors import TrainError
from llama_jax.loading import Opened, default_runtime, load, open_model
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.rlhf.pairs import PairBatch, PairSource
from llama_jax.rlhf.preference_config import PreferenceConfig
from llama_jax.rlhf.preferences import Margins
from llama_jax.runtime import TRAINING_RULES, Runtime
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.text.prompt_formats import default_format, get_format
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.losses import ModelLoss, next_token_loss
from llama_jax.train.methods import Method, train_adapters, train_weights
from llama_jax.train.report import Table
from llama_jax.train.run import RunResult, run
from llama_jax.train.run_folder import find_run

_Config = TypeVar("_Config", bound=PreferenceConfig)

RULES: Rules = {
    "--eval-every": needs("--eval-data"),
    "--final": needs("--schedule", "cosine", "linear"),
    "--lora-alpha": needs("--lora-rank"),
    "--lora-targets": needs("--lora-rank"),
    "--save-dtype": excludes("--lora-rank"),
}
"""When flags have an effect, by the settings of the run: a `PreferenceConfig`."""

PREFERENCES_HELP = (
    "files of preferences: .jsonl, .json, each also with .gz; .parquet. A record has "
    "`chosen` and `rejected`: texts of HH-RLHF, answers to a `prompt`, or dialogs"
)
"""Help of flags that name files of pairs."""


def add_data_arguments(parser: ArgumentParser, *, batch_size: int) -> None:
    """Add the flags of model and data, of which --output is required."""
    group = parser.add_argument_group("a first run")
    cli.add_checkpoint_argument(group)
    group.add_argument("--data", nargs="+", metavar="FILE", help=PREFERENCES_HELP)
    group.add_argument(
        "--eval-data",
        nargs="+",
        metavar="FILE",
        help="held-out preferences; their mean loss decides which checkpoint is the "
        "best",
    )
    group.add_argument("--format", metavar="NAME", help=prompt_files.FORMAT_HELP)
    group.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="new folder, or that of the run to --resume",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--seq-length",
        type=cli.positive_int,
        metavar="T",
        help="most tokens of a dialog; all are padded to it (default: 4096, or the "
        "model's context if shorter)",
    )
    group.add_argument(
        "--batch-size",
        type=cli.positive_int,
        metavar="B",
        help=f"pairs per step, on all devices together (default: {batch_size})",
    )
    group.add_argument(
        "--margins",
        choices=get_args(Margins),
        help="margins of the loss by `rating`, as in the Llama 2 paper (default: none)",
    )
    group.add_argument(
        "--on-long",
        choices=("drop", "refuse"),
        help="what to do with a pair that does not fit (default: drop)",
    )
    group.add_argument(
        "--on-bad",
        choices=get_args(OnBad),
        help="what to do with a record that is no pair of dialogs (default: refuse)",
    )


def add_run_arguments(parser: ArgumentParser, *, rate: str, warmup: str) -> None:
    """Add the flags of adapters, training, output and model."""
    group = parser.add_argument_group("adapters")
    add_lora_arguments(group)
    group.add_argument(
        "--lora-targets",
        nargs="+",
        choices=PROJECTIONS,
        metavar="NAME",
        help=f"projections with adapters: {', '.join(PROJECTIONS)} (default: all)",
    )
    add_training_arguments(
        parser.add_argument_group("training"), learning_rate=rate, warmup=warmup
    )
    add_output_arguments(parser.add_argument_group("output"))
    cli.add_model_arguments(parser.add_argument_group("model"))


def parse(parser: ArgumentParser, args: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; rules are checked when a resumed run is read."""
    parsed = parser.parse_args(args)
    if parsed.epochs is not None and parsed.steps is not None:
        parser.error("--epochs and --steps both say how long the run is; give one")
    if not parsed.data and not parsed.resume:
        parser.error("--data is required: files of preferences")
    return parsed


def train(
    args: argparse.Namespace,
    kind: type[_Config],
    rules: Rules,
    make: Callable[[_Config, Opened], Method],
    measure: Callable[[Loaded, PairSource], Mapping[str, Table]] | None = None,
) -> RunResult:
    """Train on preferences as the flags say, and report on standard error.

    Args:
      args: of the command.
      kind: of its settings.
      rules: of its flags.
      make: makes the method of a run.
      measure: maps the saved model and the held-out pairs to tables of the report.
    """
    output = pathlib.Path(args.output)
    saved = find_run(output, resume=args.resume)
    settings = kind.resumed({} if saved is None else saved.settings, vars(args))
    if not settings.get("data"):
        raise TrainError(
            f"{output}: there is no run to resume; give --data to start one"
        )
    config = kind.from_settings(settings)
    refuse_unused(rules, args.given, config)
    opened = open_model(
        config.checkpoint, tokenizer=config.tokenizer, max_seq_len=config.max_seq_len
    )
    tokenizer = opened.tokenizer
    config = config.for_model(opened.config, default_runtime().dtype)
    if config.format is None:
        config = dataclasses.replace(config, format=default_format(tokenizer).name)
    if config.date is None:
        date = datetime.date.today().isoformat()
        config = dataclasses.replace(config, date=date)
    print_format_note(tokenizer, config.format)
    source = open_pairs(config, tokenizer)
    held_out = (
        open_pairs(config, tokenizer, held_out=True) if config.eval_data else None
    )
    steps = config.steps
    if saved is None:
        pairs = count_pairs("data", source)
        if config.epochs is not None:
            steps = max(math.ceil(config.epochs * pairs / config.batch_size), 1)
        if held_out is not None:
            count_pairs("held-out data", held_out)
    method = make(config, opened)

    def tables() -> Mapping[str, Table]:
        if measure is None or held_out is None:
            return {}
        result = output / method.result_name
        adapters = method.lora is not None
        loaded = load(
            config.checkpoint if adapters else result,
            tokenizer=tokenizer,
            adapter=result if adapters else None,
        )
        return measure(loaded, restarted(held_out))

    return run(
        config,
        method,
        source,
        output,
        resume=args.resume,
        total_steps=steps,
        eval_batches=held_out,
        tokenizer=tokenizer,
        describe=lambda batch: {"tokens": count_tokens(batch), **source.facts()},
        reporter=TerminalReporter(),
        signals=stop_on_signals,
        report_tables=tables,
    )


def open_pairs(
    config: PreferenceConfig, tokenizer: Tokenizer, *, held_out: bool = False
) -> PairSource:
    """Open the training pairs, or the held-out ones, which are read once in order."""
    assert config.format is not None
    assert config.date is not None
    assert config.seq_length is not None
    now = datetime.datetime.fromisoformat(config.date)
    return PairSource(
        corpus=Corpus((config.eval_data or ()) if held_out else config.data),
        tokenizer=tokenizer,
        format=get_format(config.format, tokenizer, now=now),
        batch_size=config.batch_size // (config.accumulate if held_out else 1),
        length=config.seq_length,
        margins=config.margins,
        epochs=1 if held_out else config.epochs,
        shuffle=not held_out,
        seed=config.seed,
        on_bad=config.on_bad,
        on_long=config.on_long,
    )


def restarted(source: PairSource) -> PairSource:
    """All pairs of a source once, in the order of the files."""
    return dataclasses.replace(source, epochs=1, shuffle=False)


def count_pairs(name: str, source: PairSource) -> int:
    """Read the pairs once, and print how many there are and what is dropped."""
    reader = restarted(source)
    tokens = pairs = 0
    for _, chosen, rejected in reader.pairs():
        pairs += 1
        tokens += len(chosen.ids) + len(rejected.ids)
    text = f"{name}: {pairs:,} pairs, {tokens:,} tokens"
    for reason, count in reader.dropped.items():
        text += f"; {count:,} dropped ({reason})"
    print(text, file=sys.stderr)
    for problem in reader.problems[:3]:
        print(f"  {problem}", file=sys.stderr)
    return pairs


def count_tokens(batch: PairBatch) -> int:
    """Count the tokens of a batch without padding."""
    return int(np.sum((np.asarray(batch.last) + 1) * np.asarray(batch.weight)[:, None]))


def make_method(
    config: PreferenceConfig, opened: Opened, loss: ModelLoss = next_token_loss
) -> Method:
    """Make the method: all weights, or adapters."""
    assert config.dtype is not None
    mesh = make_mesh(parse_mesh(config.mesh)) if config.mesh else None
    runtime = Runtime(dtype=config.dtype, remat=config.remat, rules=TRAINING_RULES)
    if config.lora is None:
        return train_weights(
            opened.config,
            runtime.replace(param_dtype=config.param_dtype),
            mesh=mesh,
            opened=opened,
            seed=config.seed,
            loss=loss,
        )
    return train_adapters(
        opened,
        runtime,
        config.lora,
        mesh=mesh,
        dtype=config.param_dtype,
        seed=config.seed,
        loss=loss,
        base_model=config.checkpoint,
    )


def print_result(result: RunResult, stage: str, output: str) -> None:
    """Print where the result of a run is, or how to resume it."""
    if result.status == "stopped":
        text = (
            f"stopped after step {result.step}; resume with: python -m llama_jax.rlhf "
            f"{stage} --resume --output {output}"
        )
    elif result.status == "complete":
        text = f"{output}: this run is finished; see its {result.path.name}"
    else:
        files = ", ".join(file.name for file in result.report)
        text = f"{output}: {result.path.name}, metrics.jsonl, {files}"
    print(text, file=sys.stderr, flush=True)
