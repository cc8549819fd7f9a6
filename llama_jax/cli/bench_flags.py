"""The arguments of `python -m llama_jax.bench`."""

import argparse
from collections.abc import Mapping, Sequence
from typing import get_args

import jax

from llama_jax.bench.attention_work import KINDS
from llama_jax.bench.learning import PARTS
from llama_jax.bench.schedule import CORES
from llama_jax.bench.train import PeerName
from llama_jax.cli.command import positive_int
from llama_jax.cli.parser import ArgumentParser, Rule, Rules
from llama_jax.data.encode import DATA_FORMATS
from llama_jax.data.stream import Packing
from llama_jax.model.presets import EXAMPLE_MODEL
from llama_jax.runtime import DType, Remat

_DECODE = Rule(lambda args: args.only in (None, "decode"), "without decode")
_SCHEDULES = Rule(
    lambda args: not args.time and jax.default_backend() == "cpu",
    "on times, which --time, a TPU or a GPU measures",
)


def _part(*names: str) -> Rule:
    """A rule that one of these parts of `bench rlhf` is measured."""
    listed = " or ".join(names)
    return Rule(
        lambda args: args.only in (None, *names), f"without {listed}", f"for {listed}"
    )


_RULES: Mapping[str, Rules] = {
    "kernels": {
        "--chips": _SCHEDULES,
        "--int8": _DECODE,
        "--page": _DECODE,
        "--sweep": _SCHEDULES,
    },
    "rlhf": {
        "--data": _part("reward", "dpo"),
        "--folder": _part("policy"),
        "--iterations": _part("policy"),
        "--seeds": _part("policy"),
    },
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = ArgumentParser(
        prog="python -m llama_jax.bench",
        description="Measure the library on this machine, and what the machine can do.",
    )
    benchmarks = parser.add_subparsers(
        dest="benchmark", metavar="BENCHMARK", required=True
    )
    for name, purpose, add_arguments in (
        (
            "train",
            "time of a training step, next to the chip's peak or PyTorch",
            _add_train,
        ),
        ("decode", "tokens/s, next to the machine's memory bandwidth", _add_decode),
        ("prefill", "tokens/s, next to the machine's FLOP/s", _add_prefill),
        ("serve", "tokens/s of an engine, next to generate", _add_serve),
        (
            "kernels",
            "attention kernels next to jax's: TPU schedules, or times",
            _add_kernels,
        ),
        ("data", "tokens/s of reading, tokenizing and packing", _add_data),
        (
            "conversion",
            "time and host memory, next to a copy of the same bytes",
            _add_conversion,
        ),
        (
            "rlhf",
            "what the bundled model learns from preferences and rewards",
            _add_rlhf,
        ),
    ):
        benchmark = benchmarks.add_parser(
            name,
            help=purpose,
            description=purpose,
            rules=_RULES.get(name, {}),
        )
        add_arguments(benchmark)
        benchmark.add_argument(
            "--json", action="store_true", help="print one JSON object instead"
        )
    return parser.parse_args(argv)


def _add_numbers(parser: ArgumentParser, **numbers: tuple[int, str]) -> None:
    """Add positive integers: their defaults and meanings by name."""
    for name, (default, meaning) in numbers.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive_int,
            default=default,
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )


def _add_model(parser: ArgumentParser, dtype: str = "weights and activations") -> None:
    parser.add_argument(
        "--model",
        default=EXAMPLE_MODEL,
        help="a preset or a shape (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=get_args(DType),
        help=f"dtype of {dtype} (default: %(default)s)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices to use, such as fsdp=-1 (default: one device)",
    )


def _add_train(parser: ArgumentParser) -> None:
    _add_model(parser, "activations; weights are float32")
    _add_numbers(
        parser,
        batch=(8, "rows"),
        seq=(256, "tokens per row"),
        steps=(8, "steps to measure"),
    )
    parser.add_argument(
        "--remat",
        default="none",
        choices=get_args(Remat),
        help="what the backward pass recomputes (default: %(default)s)",
    )
    parser.add_argument(
        "--against",
        choices=get_args(PeerName),
        help="also run the same steps with this library, alternating with ours",
    )


def _add_decode(parser: ArgumentParser) -> None:
    _add_model(parser)
    _add_numbers(
        parser,
        batch=(1, "rows"),
        prompt_length=(16, "tokens per prompt"),
        steps=(64, "tokens to decode"),
    )


def _add_prefill(parser: ArgumentParser) -> None:
    _add_model(parser)
    _add_numbers(
        parser,
        batch=(1, "rows"),
        prompt_length=(512, "tokens per prompt"),
        steps=(8, "repetitions"),
    )


def _add_serve(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="(default: the bundled model)"
    )
    _add_numbers(
        parser,
        lanes=(8, "rows that decode together, and clients"),
        chunk=(64, "tokens of a prompt that are read at once"),
        steps=(128, "tokens of an answer"),
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.6,
        metavar="T",
        help="0 is greedy (default: %(default)s)",
    )
    parser.add_argument(
        "--dense", action="store_true", help="slots for every lane instead of pages"
    )


def _add_kernels(parser: ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument(
        "--chips",
        type=names,
        default=["v5e", "v6e"],
        metavar="NAMES",
        help=f"TPUs among {', '.join(CORES)} (default: v5e,v6e)",
    )
    parser.add_argument("--only", choices=KINDS, help="one kind (default: all)")
    parser.add_argument(
        "--shapes",
        type=names,
        default=["llama2-7b", "llama2-70b"],
        metavar="NAMES",
        help="presets, or heads such as N32K8H128 (default: llama2-7b,llama2-70b)",
    )
    parser.add_argument(
        "--lengths",
        type=numbers,
        metavar="N,N",
        help="tokens per row; for decode, slots of the cache",
    )
    _add_numbers(parser, page=(128, "slots per page of the paged cache"))
    parser.add_argument(
        "--int8", action="store_true", help="decode with keys and values in int8"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="try all tile sizes, not only the best"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="measure times on this machine (the default on a TPU or GPU)",
    )


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", help="(default: generated text)")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="(default: that of the bundled model)"
    )
    parser.add_argument(
        "--format",
        default="text",
        metavar="NAME",
        help=f"format of the records, as of finetune: {', '.join(DATA_FORMATS)} "
        "(default: %(default)s)",
    )
    _add_numbers(
        parser,
        batch=(16, "rows"),
        length=(256, "tokens per row"),
        workers=(1, "threads"),
    )
    parser.add_argument(
        "--packing",
        choices=get_args(Packing),
        default="pack",
        help="how rows are filled (default: %(default)s)",
    )


def _add_conversion(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="llama2-7b",
        help="a preset or a shape, written with random weights in Meta's format "
        "(default: %(default)s, which needs 41 GB of disk)",
    )
    parser.add_argument(
        "--layers",
        type=positive_int,
        metavar="N",
        help="use only N layers, at full width",
    )
    _add_numbers(parser, ranks=(2, "model-parallel files"))
    parser.add_argument(
        "--to",
        choices=("orbax", "hf"),
        default="orbax",
        help="target format (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        default=".",
        metavar="DIR",
        help="where there is room (default: the current folder)",
    )


def _add_rlhf(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        choices=PARTS,
        help="one part (default: all). policy: reward against KL under rejection "
        "sampling, PPO, RLOO and GRPO; ratings: reward models with margins, on planted "
        "ratings; reward: reward models in 5 folds of --data, next to simple rules; "
        "dpo: margins of held-out pairs, planted and of --data",
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="preferences, such as HH-RLHF's; reward needs it",
    )
    _add_numbers(
        parser,
        seeds=(3, "runs of each method"),
        iterations=(30, "iterations of each run, of 32 answers"),
    )
    parser.add_argument(
        "--folder",
        default=".",
        metavar="DIR",
        help="for reward-kl.csv and, if matplotlib is installed, reward-kl.png "
        "(default: the current folder)",
    )
