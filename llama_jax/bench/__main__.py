"""`python -m llama_jax.bench`: run a benchmark, and print a table or JSON."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from llama_jax.bench import tables
from llama_jax.bench.attention_work import KINDS, make_works
from llama_jax.bench.conversion import ConversionReport, measure_conversion
from llama_jax.bench.data import DataReport, measure_data
from llama_jax.bench.decode import DecodeReport, measure_decode
from llama_jax.bench.kernel_schedules import compare
from llama_jax.bench.kernel_times import measure_times, time_lines
from llama_jax.bench.learning import LearningReport, measure_learning
from llama_jax.bench.machine import describe_machine
from llama_jax.bench.prefill import PrefillReport, measure_prefill
from llama_jax.bench.schedule import CORES
from llama_jax.bench.serve import ServeReport, measure_serve
from llama_jax.bench.train import TrainReport, measure_train
from llama_jax.cli import command as cli
from llama_jax.cli.bench_flags import parse_args
from llama_jax.errors import ConfigError
from llama_jax.loading import bundled, load
from llama_jax.model.presets import parse_model
from llama_jax.runtime import Runtime
from llama_jax.serve.engine_config import EngineConfig
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import JsonObject, Mesh

Report = (
    DecodeReport
    | PrefillReport
    | TrainReport
    | DataReport
    | ConversionReport
    | LearningReport
    | ServeReport
)


class Result(NamedTuple):
    """A benchmark's settings by name, its report, and the rows of its table."""

    settings: JsonObject
    report: Report
    rows: Mapping[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark; returns 0."""
    args = parse_args(argv)
    if args.benchmark == "kernels":
        return _kernels(args)
    measure = {
        "train": _train,
        "decode": _decode,
        "prefill": _prefill,
        "serve": _serve,
        "data": _data,
        "conversion": _conversion,
        "rlhf": _rlhf,
    }[args.benchmark]
    result, machine = measure(args), describe_machine()
    if args.json:
        report = dataclasses.asdict(machine) | dict(result.settings)
        report |= dataclasses.asdict(result.report)
        print(json.dumps({"benchmark": args.benchmark} | report))
        return 0
    settings = dict(result.settings)
    title = settings.pop("model", None) or settings["files"]
    print(f"{args.benchmark}: {title}")
    print(f"  {machine.device}; {machine.host}")
    print(f"  jax {machine.jax}; {machine.date}")
    print(f"  {', '.join(f'{name} {value}' for name, value in settings.items())}")
    width = max(map(len, result.rows))
    for name, value in result.rows.items():
        print(f"  {name:<{width}}  {value}")
    return 0


def _settings(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def _mesh(args: argparse.Namespace) -> Mesh | None:
    return make_mesh(parse_mesh(args.mesh)) if args.mesh else None


def _decode(args: argparse.Namespace) -> Result:
    config = parse_model(args.model, args.prompt_length + args.steps)
    sizes = _settings(args, "batch", "prompt_length", "steps")
    runtime = Runtime(dtype=args.dtype)
    report = measure_decode(config, runtime, **sizes, mesh=_mesh(args))
    settings = _settings(args, "model", "dtype", *sizes, "mesh")
    return Result(settings, report, tables.decode_rows(report))


def _prefill(args: argparse.Namespace) -> Result:
    config = parse_model(args.model, args.prompt_length + args.steps)
    sizes = _settings(args, "batch", "prompt_length", "steps")
    runtime = Runtime(dtype=args.dtype)
    report = measure_prefill(config, runtime, **sizes, mesh=_mesh(args))
    settings = _settings(args, "model", "dtype", *sizes, "mesh")
    return Result(settings, report, tables.prefill_rows(report))


def _serve(args: argparse.Namespace) -> Result:
    loaded = load(args.checkpoint)
    pages = 0 if args.dense else None
    config = EngineConfig(
        lanes=args.lanes, chunk=args.chunk, pages=pages, max_waiting=args.lanes
    )
    report = measure_serve(
        loaded, config, steps=args.steps, temperature=args.temperature
    )
    settings = _settings(args, "lanes", "chunk", "dense", "steps", "temperature")
    settings["model"] = args.checkpoint or "the bundled model"
    return Result(settings, report, tables.serve_rows(report))


def _train(args: argparse.Namespace) -> Result:
    config = parse_model(args.model, args.seq)
    runtime = Runtime(
        dtype=args.dtype,
        param_dtype="float32",
        layer_layout="stacked",
        remat=args.remat,
    )
    sizes = _settings(args, "batch", "seq", "steps")
    report = measure_train(
        config, runtime, **sizes, mesh=_mesh(args), against=args.against
    )
    settings = _settings(args, "model", "dtype", *sizes, "remat", "mesh")
    return Result(settings, report, tables.train_rows(report))


def _conversion(args: argparse.Namespace) -> Result:
    config = parse_model(args.model, 2048)
    if args.layers is not None:
        config = config.replace(num_layers=args.layers)
    report = measure_conversion(
        config, ranks=args.ranks, target=args.to, folder=pathlib.Path(args.folder)
    )
    settings = _settings(args, "model", "layers", "ranks", "to")
    settings["layers"] = config.num_layers
    return Result(settings, report, tables.conversion_rows(report))


def _data(args: argparse.Namespace) -> Result:
    tokenizer = Tokenizer.from_file(args.tokenizer or bundled() / "tokenizer.model")
    report = measure_data(
        args.files,
        tokenizer,
        format=args.format,
        batch_size=args.batch,
        length=args.length,
        packing=args.packing,
        workers=args.workers,
    )
    names = ("files", "format", "batch", "length", "packing", "workers")
    settings = _settings(args, *names)
    settings["files"] = " ".join(args.files) or "generated"
    return Result(settings, report, tables.data_rows(report))


def _rlhf(args: argparse.Namespace) -> Result:
    names = ("seeds", "iterations")
    report = measure_learning(
        only=args.only,
        data=args.data,
        folder=pathlib.Path(args.folder),
        **_settings(args, *names),
    )
    settings = {"model": "bundled", **_settings(args, "only", "data", *names)}
    return Result(settings, report, tables.learning_rows(report))


def _kernels(args: argparse.Namespace) -> int:
    kinds = [args.only] if args.only else KINDS
    works = list(
        make_works(kinds, args.shapes, args.lengths, page=args.page, int8=args.int8)
    )
    if unknown := set(args.chips) - set(CORES):
        raise ConfigError(
            f"--chips {','.join(sorted(unknown))}: unknown; use {', '.join(CORES)}"
        )
    machine = describe_machine()
    report: dict[str, Any] = {"benchmark": "kernels", **dataclasses.asdict(machine)}

    def log(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    log(f"kernels\n  {machine.device}; {machine.host}")
    log(f"  jax {machine.jax}; {machine.date}")
    if args.time or jax.default_backend() in ("tpu", "gpu"):
        report |= measure_times(works)
        for line in time_lines(report):
            log(f"  {line}")
    else:
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                "schedules need the TPU's compiler; pip install libtpu, or measure "
                "this machine with --time"
            )
        report |= {"libtpu": importlib.metadata.version("libtpu"), "rows": []}
        log(f"  bundles of static schedules; libtpu {report['libtpu']}")
        for chip in args.chips:
            for shape, work in works:
                rows = f", {work.rows} rows" if work.kind == "decode" else ""
                log(f"\n{chip} {work.kind} {shape}, length {work.length}{rows}")
                for row, line in compare(chip, shape, work, sweep=args.sweep):
                    report["rows"] += [row] if row else []
                    log(f"  {line}")
    if args.json:
        print(json.dumps(report))
    return 0


if __name__ == "__main__":
    cli.run(main)
