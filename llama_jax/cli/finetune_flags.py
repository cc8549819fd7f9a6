"""The flags of `python -m llama_jax.finetune`; what was not given is None."""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from llama_jax.cli import command as cli
from llama_jax.cli.processes import add_process_arguments
from llama_jax.data.encode import DATA_FORMATS, OnLong
from llama_jax.data.records import OnBad
from llama_jax.data.stream import Packing
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.runtime import DType, Remat
from llama_jax.train.optimizer import OptimizerName, ScheduleName
from llama_jax.weights import Kind


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that needs neither model nor data."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.finetune",
        description="Train a Llama further on your data, all of it or adapters, or a "
        "new one from scratch. `finetune tokenizer` trains a tokenizer, `finetune "
        "merge` puts adapters into their model; both have a --help of their own.",
        epilog="The output folder holds metrics.jsonl (a line per step), checkpoints/ "
        "(to --resume from), at the end model/ or adapter/ (for `python -m "
        "llama_jax.sample`), best/ where that is another step's, and report.html. "
        "Ctrl-C and SIGTERM save and end the run; --resume goes on. Defaults are the "
        "settings of the Llama 2 paper.",
    )
    cli.add_model_arguments(parser)
    add_process_arguments(parser)
    _add_data(parser.add_argument_group("data"))
    _add_method(parser.add_argument_group("what is trained"))
    _add_training(parser.add_argument_group("training"))
    _add_output(parser.add_argument_group("output"))
    args = parser.parse_args(argv)
    if args.method == "full" and (args.lora_rank or args.lora_alpha):
        parser.error("--lora-rank and --lora-alpha belong to --method lora and qlora")
    if args.quantize and args.method != "qlora" and not args.resume:
        parser.error("--quantize belongs to --method qlora")
    if args.from_scratch and args.method not in (None, "full"):
        parser.error("--from-scratch has no weights to adapt; leave out --method")
    if args.from_scratch and not (args.preset or args.resume):
        parser.error("--from-scratch needs --preset, a name or a shape")
    if args.preset and not (args.from_scratch or args.resume):
        parser.error("--preset belongs to --from-scratch")
    if args.epochs is not None and args.steps is not None:
        parser.error("--epochs and --steps are two ways to say one thing; give one")
    if args.output is None and not args.show_batch:
        parser.error("--output is needed: the folder that the run writes to")
    if not args.data and not args.resume:
        parser.error("--data is needed: files of records to learn from")
    return args


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        metavar="FILE",
        help=".jsonl, .json, .parquet or .txt, also with .gz: texts, prompts with "
        "responses, Alpaca records, dialogs of OpenAI's or ShareGPT's shape",
    )
    group.add_argument(
        "--format",
        choices=DATA_FORMATS,
        metavar="NAME",
        help=f"how a record is written: {', '.join(DATA_FORMATS)} (default: text)",
    )
    group.add_argument(
        "--seq-length",
        type=cli.positive_int,
        metavar="T",
        help="tokens of a row (default: 4096, or the model's context if shorter)",
    )
    group.add_argument(
        "--batch-size",
        type=cli.positive_int,
        metavar="B",
        help="rows of a step, on all devices together (default: 64; adapters 16)",
    )
    group.add_argument(
        "--packing",
        choices=get_args(Packing),
        help="several records in a row that do not see each other, one in each, or "
        "texts cut where a row is full (default: pack)",
    )
    group.add_argument(
        "--on-long",
        choices=get_args(OnLong),
        help="what becomes of an answer that does not fit (default: drop)",
    )
    group.add_argument(
        "--on-bad",
        choices=get_args(OnBad),
        help="what becomes of a record that is malformed or has nothing to learn; what "
        "is dropped is named with file and line (default: refuse)",
    )
    group.add_argument(
        "--infilling-rate",
        type=float,
        metavar="P",
        help="with --format infilling: how many texts are cut (default: 0.9)",
    )
    group.add_argument(
        "--eval-data",
        nargs="+",
        metavar="FILE",
        help="held-out records, whose mean loss is measured and decides what is best",
    )
    group.add_argument(
        "--show-batch",
        type=cli.positive_int,
        metavar="N",
        help="print N rows as they will be trained on, what is learnt in green (in "
        "brackets where there is no colour), and end",
    )


def _add_method(group: Any) -> None:
    group.add_argument(
        "--method",
        choices=("full", "lora", "qlora"),
        help="all weights; adapters beside frozen weights; or beside weights in few "
        "bits (default: full)",
    )
    group.add_argument(
        "--lora-rank",
        type=cli.positive_int,
        metavar="R",
        help="of adapters (default: 16)",
    )
    group.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="what adapters say is multiplied by A / R (default: 32)",
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        choices=PROJECTIONS,
        metavar="NAME",
        help=f"projections with adapters, of {', '.join(PROJECTIONS)} (default: all)",
    )
    group.add_argument(
        "--quantize",
        choices=get_args(Kind),
        help="with --method qlora: how weights are held (default: nf4)",
    )
    group.add_argument(
        "--from-scratch",
        action="store_const",
        const=True,
        help="begin with random weights; needs --preset and --tokenizer (or the "
        "tokenizer of --checkpoint)",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="with --from-scratch: a published model, or a shape as in "
        "L12,D768,N12,F2048,V32000 (`,tied`: the embedding is the output head)",
    )
    group.add_argument(
        "--rope-theta",
        type=float,
        metavar="BASE",
        help="of rotary positions, in place of the checkpoint's (long contexts: 1e6)",
    )


def _add_training(group: Any) -> None:
    group.add_argument(
        "--epochs",
        type=cli.positive_int,
        metavar="E",
        help="(default: 2; from scratch 1)",
    )
    group.add_argument(
        "--steps", type=cli.positive_int, metavar="N", help="in place of --epochs"
    )
    group.add_argument(
        "--accumulate",
        type=cli.positive_int,
        metavar="G",
        help="parts of a batch that go one after another, to save memory (default: 1)",
    )
    group.add_argument(
        "--optimizer", choices=get_args(OptimizerName), help="(default: adamw)"
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help="at its peak (default: 2e-5; adapters 2e-4; from scratch 3e-4)",
    )
    group.add_argument(
        "--schedule",
        choices=get_args(ScheduleName),
        help="how it falls behind the peak (default: cosine)",
    )
    group.add_argument(
        "--final",
        type=float,
        metavar="PART",
        help="of the peak, which is left at the end of a fall (default: 0.1)",
    )
    group.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        help="steps in which it rises (default: 3 %%; from scratch 10 %%, up to 2000)",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        metavar="X",
        help="of all but norms (default: 0.1; adapters 0)",
    )
    group.add_argument(
        "--clip",
        type=float,
        metavar="X",
        help="most that the norm of all gradients may be; 0 for no limit (default: 1)",
    )
    group.add_argument(
        "--param-dtype",
        choices=get_args(DType),
        help="of what is trained and its moments (default: float32)",
    )
    group.add_argument(
        "--remat",
        choices=get_args(Remat),
        help="what the backward pass computes again: nothing, all of a block, or all "
        "but its matrix products (default: block)",
    )
    group.add_argument(
        "--seed", type=int, help="of order, first weights and infilling (default: 0)"
    )
    group.add_argument(
        "--max-skipped",
        type=int,
        metavar="N",
        help="steps without a finite loss or gradient that are skipped before the run "
        "ends; their batches are kept (default: 10)",
    )


def _add_output(group: Any) -> None:
    group.add_argument(
        "--output", metavar="DIR", help="a new folder, or with --resume that of before"
    )
    group.add_argument(
        "--save-dtype",
        choices=get_args(DType),
        help="of the model that is written at the end (default: --param-dtype)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in --output; flags that are not given are "
        "those of before, and --mesh may be another",
    )
    for flag, what in (
        ("--save-every", "a checkpoint"),
        ("--eval-every", "an evaluation, with --eval-data (also first and last)"),
        ("--sample-every", "samples, with --sample-prompt"),
    ):
        group.add_argument(
            flag,
            type=cli.positive_int,
            metavar="N",
            help=f"steps between which there is {what} (default: 100)",
        )
    group.add_argument(
        "--keep",
        type=cli.positive_int,
        metavar="N",
        help="latest checkpoints that are kept, the best besides (default: 2)",
    )
    group.add_argument(
        "--sample-prompt",
        nargs="+",
        metavar="TEXT",
        help="texts to continue, or messages to answer, as training goes on",
    )
    group.add_argument(
        "--sample-tokens",
        type=cli.positive_int,
        metavar="N",
        help="most that a sample has (default: 128)",
    )
    group.add_argument(
        "--tensorboard",
        action="store_const",
        const=True,
        help='also write event files; pip install "llama-jax[tensorboard]"',
    )
    group.add_argument(
        "--wandb",
        metavar="PROJECT",
        help='also log to Weights & Biases; pip install "llama-jax[wandb]"',
    )
