"""`python -m llama_jax.bench`: measure, and print a table or JSON."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax

from llama_jax.bench import kernels
from llama_jax.bench.conversion import measure_conversion
from llama_jax.bench.data import measure_data
from llama_jax.bench.decode import DecodeReport, measure_decode
from llama_jax.bench.kernel_times import lines_of, measure_times
from llama_jax.bench.machine import Machine, describe
from llama_jax.bench.prefill import PrefillReport, measure_prefill
from llama_jax.bench.schedule import CHIPS
from llama_jax.bench.tables import (
    conversion_rows,
    data_rows,
    decode_rows,
    prefill_rows,
    train_rows,
)
from llama_jax.bench.train import measure_train
from llama_jax.data.encode import DATA_FORMATS
from llama_jax.data.stream import Packing
from llama_jax.errors import ConfigError, LlamaJaxError
from llama_jax.loading import bundled
from llama_jax.presets import EXAMPLE_MODEL, parse_model
from llama_jax.runtime import Remat, Runtime
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.text.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; 0, or 2 where the arguments make no sense."""
    options = _parser().parse_args(arguments)
    if options.benchmark == "kernels":
        return _run_kernels(options)
    if options.benchmark == "conversion":
        return _run_conversion(options)
    if options.benchmark == "data":
        return _run_data(options)
    if options.benchmark == "train":
        return _run_train(options)
    try:
        _check_positive(options, "batch", "prompt_length", "steps")
        config = parse_model(options.model, options.prompt_length + options.steps)
        runtime = Runtime(dtype=options.dtype)
        mesh = make_mesh(parse_mesh(options.mesh)) if options.mesh else None
        workload = {
            "batch": options.batch,
            "prompt_length": options.prompt_length,
            "steps": options.steps,
        }
        machine = describe()
        report: DecodeReport | PrefillReport
        if options.benchmark == "decode":
            report = measure_decode(config, runtime, **workload, mesh=mesh)
            rows = decode_rows(report)
        else:
            report = measure_prefill(config, runtime, **workload, mesh=mesh)
            rows = prefill_rows(report)
    except LlamaJaxError as error:
        print(error, file=sys.stderr)
        return 2
    asked = {"model": options.model, "dtype": options.dtype, **workload}
    asked["mesh"] = options.mesh
    _show(options, machine, asked, report, rows)
    return 0


def _check_positive(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}; "
                "it must be at least 1"
            )


def _run_train(options: argparse.Namespace) -> int:
    try:
        _check_positive(options, "batch", "seq", "steps")
        config = parse_model(options.model, options.seq)
        runtime = Runtime(
            dtype=options.dtype,
            param_dtype="float32",
            layer_layout="stacked",
            remat=options.remat,
        )
        mesh = make_mesh(parse_mesh(options.mesh)) if options.mesh else None
        report = measure_train(
            config,
            runtime,
            batch=options.batch,
            seq=options.seq,
            steps=options.steps,
            mesh=mesh,
            against=options.against,
        )
    except LlamaJaxError as error:
        print(error, file=sys.stderr)
        return 2
    names = ("model", "dtype", "batch", "seq", "steps", "remat", "mesh")
    asked = {name: getattr(options, name) for name in names}
    _show(options, describe(), asked, report, train_rows(report))
    return 0


def _run_conversion(options: argparse.Namespace) -> int:
    try:
        config = parse_model(options.model, 2048)
        if options.layers is not None:
            config = config.replace(num_layers=options.layers)
        report = measure_conversion(
            config,
            ranks=options.ranks,
            target=options.to,
            folder=pathlib.Path(options.folder),
        )
    except (LlamaJaxError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    asked = {
        "model": options.model,
        "layers": config.num_layers,
        "ranks": options.ranks,
        "to": options.to,
    }
    _show(options, describe(), asked, report, conversion_rows(report))
    return 0


def _run_data(options: argparse.Namespace) -> int:
    asked = {
        "files": " ".join(options.files) or "made up",
        "format": options.format,
        "batch": options.batch,
        "length": options.length,
        "packing": options.packing,
        "workers": options.workers,
    }
    try:
        tokenizer = Tokenizer.from_file(
            options.tokenizer or bundled() / "tokenizer.model"
        )
        report = measure_data(
            options.files,
            tokenizer,
            format=options.format,
            batch_size=options.batch,
            length=options.length,
            packing=options.packing,
            workers=options.workers,
        )
    except (LlamaJaxError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    options.model = asked["files"]
    _show(options, describe(), asked, report, data_rows(report))
    return 0


def _run_kernels(options: argparse.Namespace) -> int:
    kinds = [options.only] if options.only else kernels.KINDS
    try:
        asked = list(
            kernels.works(
                kinds,
                options.shapes,
                options.lengths,
                page=options.page,
                eight_bits=options.int8,
            )
        )
        if unknown := set(options.chips) - set(CHIPS):
            raise ConfigError(f"--chips: {', '.join(sorted(unknown))} is not known")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    machine = describe()
    found: dict[str, Any] = {"benchmark": "kernels", **dataclasses.asdict(machine)}

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    say(f"kernels\n  {machine.device}; {machine.host}")
    say(f"  jax {machine.jax}; {machine.date}")
    if options.time or jax.default_backend() in ("tpu", "gpu"):
        found |= measure_times(asked)
        for line in lines_of(found):
            say(f"  {line}")
    else:
        if importlib.util.find_spec("libtpu") is None:
            print("the TPU's compiler is needed: pip install libtpu", file=sys.stderr)
            return 2
        found["libtpu"] = importlib.metadata.version("libtpu")
        found["rows"] = []
        say(f"  bundles of static schedules; libtpu {found['libtpu']}")
        for chip in options.chips:
            for shape, work in asked:
                rows = f", {work.rows} rows" if work.kind == "decode" else ""
                say(f"\n{chip} {work.kind} {shape}, length {work.length}{rows}")
                for row, line in kernels.compare(
                    chip, shape, work, sweep=options.sweep
                ):
                    found["rows"] += [row] if row else []
                    say(f"  {line}")
    if options.json:
        print(json.dumps(found))
    return 0


def _show(
    options: argparse.Namespace,
    machine: Machine,
    asked: Mapping[str, Any],
    report: Any,
    rows: Mapping[str, str],
) -> None:
    if options.json:
        found: dict[str, Any] = {"benchmark": options.benchmark}
        found |= {**dataclasses.asdict(machine), **asked, **dataclasses.asdict(report)}
        print(json.dumps(found))
    else:
        _print_table(f"{options.benchmark}: {options.model}", machine, asked, rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.bench",
        description="Measure this library on this machine, beside what it can do.",
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    _train_options(benchmarks)
    for name, purpose, length, steps, counted in (
        ("decode", "tokens/s and weights streamed", 16, 64, "tokens to decode"),
        ("prefill", "tokens/s and FLOP/s", 512, 8, "times to read the prompts"),
    ):
        bench = benchmarks.add_parser(name, help=purpose, description=purpose)
        _model_options(bench, "of weights and activations", batch=1)
        in_each = ("prompt-length", length, "tokens in each prompt")
        _number_options(bench, in_each, ("steps", steps, counted))
    purpose = "attention kernels beside jax's: schedules for TPUs, or times"
    _kernel_options(benchmarks.add_parser("kernels", help=purpose, description=purpose))
    purpose = "tokens/s of reading, tokenizing and packing"
    _data_options(benchmarks.add_parser("data", help=purpose, description=purpose))
    purpose = "seconds and host memory, beside copying the same bytes"
    bench = benchmarks.add_parser("conversion", help=purpose, description=purpose)
    bench.add_argument(
        "--model",
        default="llama2-7b",
        help="a preset or a shape, written with random weights as Meta would "
        "(default: %(default)s, which needs 41 GB of disk)",
    )
    bench.add_argument(
        "--layers", type=int, help="so many of its layers only, at full width"
    )
    bench.add_argument(
        "--ranks", type=int, default=2, help="files (default: %(default)s)"
    )
    bench.add_argument(
        "--to",
        choices=("orbax", "hf"),
        default="orbax",
        help="format to convert to (default: %(default)s)",
    )
    bench.add_argument(
        "--folder", default=".", help="where there is room (default: this one)"
    )
    for bench in benchmarks.choices.values():
        bench.add_argument(
            "--json", action="store_true", help="print one JSON object instead"
        )
    return parser


def _model_options(
    parser: argparse.ArgumentParser, of_what: str, *, batch: int
) -> None:
    parser.add_argument(
        "--model",
        default=EXAMPLE_MODEL,
        help="a preset, or a shape as in %(default)s (the default)",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help=f"{of_what} (default: %(default)s)",
    )
    parser.add_argument("--mesh", help="as in fsdp=-1 (default: one device)")
    _number_options(parser, ("batch", batch, "rows"))


def _train_options(benchmarks: Any) -> None:
    purpose = "seconds of a step, beside the chip's peak or PyTorch"
    parser = benchmarks.add_parser("train", help=purpose, description=purpose)
    _model_options(parser, "of activations; weights are float32", batch=8)
    _number_options(parser, ("seq", 256, "tokens of a row"), ("steps", 8, "to measure"))
    parser.add_argument(
        "--remat",
        default="none",
        choices=get_args(Remat),
        help="what the backward pass computes again (default: %(default)s)",
    )
    parser.add_argument(
        "--against", choices=("torch",), help="who takes the same steps in turns"
    )


def _number_options(
    parser: argparse.ArgumentParser, *numbers: tuple[str, int, str]
) -> None:
    for name, default, meaning in numbers:
        help = f"{meaning} (default: {default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=help)


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", help="(default: text that is made up)")
    parser.add_argument("--tokenizer", help="(default: the bundled model's)")
    parser.add_argument(
        "--format",
        choices=DATA_FORMATS,
        default="text",
        help="(default: text)",
        metavar="NAME",
    )
    _number_options(
        parser,
        ("batch", 16, "rows"),
        ("length", 256, "slots of a row"),
        ("workers", 1, "threads"),
    )
    parser.add_argument(
        "--packing", choices=get_args(Packing), default="pack", help="(default: pack)"
    )


def _kernel_options(parser: argparse.ArgumentParser) -> None:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument(
        "--chips",
        type=names,
        default=["v5e", "v6e"],
        help=f"of {', '.join(CHIPS)} (default: v5e,v6e)",
    )
    parser.add_argument("--only", choices=kernels.KINDS, help="(default: all)")
    parser.add_argument(
        "--shapes",
        type=names,
        default=["llama2-7b", "llama2-70b"],
        help="presets, or heads as in N32K8H128 (default: llama2-7b,llama2-70b)",
    )
    parser.add_argument("--lengths", type=numbers, help="T, or S of decode")
    parser.add_argument(
        "--page", type=int, default=128, help="slots of decode's pages (default: 128)"
    )
    parser.add_argument(
        "--int8", action="store_true", help="decode over keys and values in eight bits"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="all tiles; otherwise the best known"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="measure seconds here, as is done anyway where there is an accelerator",
    )


def _print_table(
    title: str, machine: Machine, asked: Mapping[str, Any], rows: Mapping[str, str]
) -> None:
    print(title)
    print(f"  {machine.device}; {machine.host}")
    print(f"  jax {machine.jax}; {machine.date}")
    setting = (f"{name} {value}" for name, value in asked.items() if name != "model")
    print(f"  {', '.join(setting)}")
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    raise SystemExit(main())
