"""The flags of `python -m llama_jax.finetune`; their defaults are None."""

import argparse
from collections.abc import Sequence
from typing import get_args

from llama_jax.cli import command as cli
from llama_jax.cli.command import Group
from llama_jax.cli.parser import ArgumentParser, Rule, Rules, needs
from llama_jax.cli.processes import add_process_arguments
from llama_jax.cli.run_flags import add_output_arguments, add_training_arguments
from llama_jax.config import RopeScalingKind
from llama_jax.data.encode import DATA_FORMATS, OnLong
from llama_jax.data.records import OnBad
from llama_jax.data.stream import Packing
from llama_jax.model.extended_context import EXAMPLE_SCALING
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.weights import Kind

_PROGRAM = "python -m llama_jax.finetune"

_ADAPTERS = needs("--method", "lora", "qlora")
_SAMPLES = needs("--sample-prompt")
RULES: Rules = {
    "--checkpoint": Rule(
        lambda run: not (run.from_scratch and run.tokenizer),
        "with --from-scratch and --tokenizer",
    ),
    "--eval-every": needs("--eval-data"),
    "--final": needs("--schedule", "cosine", "linear"),
    "--from-scratch": needs("--method", "full"),
    "--infilling-rate": needs("--format", "infilling"),
    "--lora-alpha": _ADAPTERS,
    "--lora-rank": _ADAPTERS,
    "--lora-targets": _ADAPTERS,
    "--on-long": Rule(lambda run: run.format != "infilling", "with --format infilling"),
    "--preset": needs("--from-scratch"),
    "--quantize": needs("--method", "qlora"),
    "--sample-every": _SAMPLES,
    "--sample-tokens": _SAMPLES,
    "--save-dtype": needs("--method", "full"),
}
"""When flags have an effect, by the settings of the run: a `FinetuneConfig`."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; `RULES` is checked when a resumed run is read."""
    parser = ArgumentParser(
        prog=_PROGRAM,
        usage=f"""
  {_PROGRAM} --data FILE --output DIR [options]
  {_PROGRAM} --resume --output DIR
  {_PROGRAM} merge --help        merge adapters
  {_PROGRAM} tokenizer --help    train a tokenizer""",
        description="Fine-tune a Llama on your data (all weights, or adapters), or "
        "train one from scratch.",
        epilog="The output folder has metrics.jsonl (a line per step), checkpoints/ "
        "(for --resume) and, at the end, model/ or adapter/ (for `python -m "
        "llama_jax.sample`), best/ if another step had the best held-out loss, and "
        "report.html. Ctrl-C and SIGTERM save and end the run; --resume continues it. "
        "Defaults are the settings of the Llama 2 paper. A flag without effect is "
        "refused.",
        rules=RULES,
        check=False,
    )
    _add_first(parser.add_argument_group("a first run"))
    _add_data(parser.add_argument_group("data"))
    _add_method(parser.add_argument_group("method"))
    add_training_arguments(
        parser.add_argument_group("training"),
        epochs="2; from scratch 1",
        learning_rate="2e-5; adapters 2e-4; from scratch 3e-4",
        warmup="3 %%; from scratch 10 %%, up to 2000",
        seeded="data order, initial weights and infilling",
    )
    group = parser.add_argument_group("output")
    add_output_arguments(group)
    _add_samples(group)
    cli.add_model_arguments(parser.add_argument_group("model"))
    add_process_arguments(parser)
    args = parser.parse_args(argv)
    if args.from_scratch and not (args.preset or args.resume):
        parser.error("--from-scratch needs --preset, a name or a shape")
    if args.epochs is not None and args.steps is not None:
        parser.error("--epochs and --steps both say how long the run is; give one")
    if args.output is None and not args.show_batch:
        parser.error("--output is required: a folder for the run")
    if not args.data and not args.resume:
        parser.error("--data is required: files to learn from")
    return args


def _add_first(group: Group) -> None:
    cli.add_checkpoint_argument(group)
    group.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help=".jsonl, .json or .txt (each also with .gz), or .parquet: texts, prompts "
        "with responses, Alpaca records, or dialogs as OpenAI's or ShareGPT's",
    )
    group.add_argument(
        "--format",
        metavar="NAME",
        help=f"format of records: {', '.join(DATA_FORMATS)} (the checkpoint's chat "
        "template), or template:NAME (default: auto, which is template for dialogs if "
        "the checkpoint has one, otherwise text)",
    )
    group.add_argument(
        "--method",
        choices=("full", "lora", "qlora"),
        help="train all weights, adapters on frozen weights, or adapters on quantized "
        "weights (default: full)",
    )
    group.add_argument(
        "--output", metavar="DIR", help="new folder, or that of the run to --resume"
    )
    group.add_argument(
        "--show-batch",
        type=cli.positive_int,
        metavar="N",
        help="print N rows of this run as training sees them, with learnt tokens in "
        "green (in brackets without colours), and exit",
    )


def _add_data(group: Group) -> None:
    group.add_argument(
        "--seq-length",
        type=cli.positive_int,
        metavar="T",
        help="tokens per row (default: 4096, or the model's context if shorter)",
    )
    group.add_argument(
        "--batch-size",
        type=cli.positive_int,
        metavar="B",
        help="rows per step, on all devices together (default: 64; adapters 16)",
    )
    group.add_argument(
        "--packing",
        choices=get_args(Packing),
        help="pack several records into a row, where they do not see each other; pad, "
        "one record per row; or split texts where a row is full (default: pack)",
    )
    group.add_argument(
        "--on-long",
        choices=get_args(OnLong),
        help="what to do with a record with answers that does not fit (default: drop)",
    )
    group.add_argument(
        "--on-bad",
        choices=get_args(OnBad),
        help="what to do with a record that is malformed or has nothing to learn; "
        "dropped ones are named with file and line (default: refuse)",
    )
    group.add_argument(
        "--infilling-rate",
        type=float,
        metavar="P",
        help="fraction of texts that are cut (default: 0.9)",
    )
    group.add_argument(
        "--eval-data",
        nargs="+",
        metavar="FILE",
        help="held-out records; their mean loss decides which checkpoint is the best",
    )


def _add_method(group: Group) -> None:
    group.add_argument(
        "--lora-rank",
        type=cli.positive_int,
        metavar="R",
        help="rank of adapters (default: 16)",
    )
    group.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="adapters are scaled by A / R (default: 32)",
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        choices=PROJECTIONS,
        metavar="NAME",
        help=f"projections with adapters: {', '.join(PROJECTIONS)} (default: all)",
    )
    group.add_argument(
        "--quantize",
        choices=get_args(Kind),
        help="format of the frozen weights (default: nf4)",
    )
    group.add_argument(
        "--from-scratch",
        action="store_const",
        const=True,
        help="start from random weights; needs --preset, and --tokenizer (or the "
        "tokenizer of --checkpoint)",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="a published model, or a shape such as "
        "L12,D768,N12,F2048,V32000 (add `,tied` to share embedding and output head)",
    )
    group.add_argument(
        "--rope-theta",
        type=float,
        metavar="BASE",
        help="base of rotary positions, instead of the checkpoint's (1e6 for long "
        "contexts)",
    )
    group.add_argument(
        "--rope-scaling",
        metavar="KIND,FACTOR",
        help=f"scale rotary positions for a longer context, as in {EXAMPLE_SCALING}: "
        f"kinds {', '.join(get_args(RopeScalingKind))}; more fields after a comma, as "
        "in original_max_seq_len=4096 (default: the model's context). --max-seq-len "
        "defaults to the factor times that",
    )


def _add_samples(group: Group) -> None:
    group.add_argument(
        "--sample-prompt",
        nargs="+",
        metavar="TEXT",
        help="texts to continue, or messages to answer, during training",
    )
    group.add_argument(
        "--sample-tokens",
        type=cli.positive_int,
        metavar="N",
        help="most tokens of a sample (default: 128)",
    )
    group.add_argument(
        "--sample-every",
        type=cli.positive_int,
        metavar="N",
        help="steps between samples (default: 100)",
    )
