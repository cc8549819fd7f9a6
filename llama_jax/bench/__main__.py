"""`python -m llama_jax.bench decode|prefill`: measure, and print a table or JSON."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.bench.decode import DecodeReport, measure_decode
from llama_jax.bench.machine import Machine, describe
from llama_jax.bench.prefill import PrefillReport, measure_prefill
from llama_jax.bench.shapes import DEFAULT, parse_model
from llama_jax.errors import ConfigError, LlamaJaxError
from llama_jax.runtime import Runtime


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark; 0, or 2 where the arguments make no sense."""
    options = _parser().parse_args(arguments)
    try:
        for name in ("batch", "prompt_length", "steps"):
            if getattr(options, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(options, name)}; "
                    "it must be at least 1"
                )
        config = parse_model(options.model, options.prompt_length + options.steps)
        runtime = Runtime(dtype=options.dtype)
    except LlamaJaxError as error:
        print(error, file=sys.stderr)
        return 2
    workload = {
        "batch": options.batch,
        "prompt_length": options.prompt_length,
        "steps": options.steps,
    }
    machine = describe()
    report: DecodeReport | PrefillReport
    if options.benchmark == "decode":
        report = measure_decode(config, runtime, **workload)
        rows = _decode_rows(report)
    else:
        report = measure_prefill(config, runtime, **workload)
        rows = _prefill_rows(report)
    asked = {"model": options.model, "dtype": options.dtype, **workload}
    if options.json:
        found: dict[str, Any] = {"benchmark": options.benchmark}
        found |= dataclasses.asdict(machine) | asked | dataclasses.asdict(report)
        print(json.dumps(found))
    else:
        _print_table(f"{options.benchmark}: {options.model}", machine, asked, rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.bench",
        description="Measure this library on this machine, beside what it can do.",
    )
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name, purpose, length, steps, counted in (
        ("decode", "tokens/s and weights streamed", 16, 64, "tokens to decode"),
        ("prefill", "tokens/s and FLOP/s", 512, 8, "times to read the prompts"),
    ):
        bench = benchmarks.add_parser(name, help=purpose, description=purpose)
        bench.add_argument(
            "--model",
            default=DEFAULT,
            help="a preset, or a shape as in %(default)s (the default)",
        )
        bench.add_argument(
            "--dtype",
            default="float32",
            choices=("float32", "bfloat16", "float16"),
            help="of weights and activations (default: %(default)s)",
        )
        bench.add_argument(
            "--batch", type=int, default=1, help="rows (default: %(default)s)"
        )
        bench.add_argument(
            "--prompt-length",
            type=int,
            default=length,
            help="tokens in each prompt (default: %(default)s)",
        )
        bench.add_argument(
            "--steps", type=int, default=steps, help=f"{counted} (default: %(default)s)"
        )
        bench.add_argument(
            "--json", action="store_true", help="print one JSON object instead"
        )
    return parser


def _decode_rows(report: DecodeReport) -> dict[str, str]:
    limits = report.bandwidth
    return {
        "parameters": f"{report.params:,}",
        "weights read per step": f"{report.weight_bytes / 1e6:,.1f} MB",
        "cache slots per row": str(report.cache_slots),
        "decoding": f"{report.tokens_per_s:,.1f} tokens/s "
        f"(median {report.median_tokens_per_s:,.1f})",
        "weights streamed": f"{report.gb_per_s:,.1f} GB/s",
        "1 GiB reduction": f"{limits.reduction:,.1f} GB/s",
        "1 GiB matrix-vector": f"{limits.matvec:,.1f} GB/s",
        "1 GiB copy (both ways)": f"{limits.copy:,.1f} GB/s",
        "part of the highest": f"{report.ratio:.0%}",
    }


def _prefill_rows(report: PrefillReport) -> dict[str, str]:
    return {
        "parameters": f"{report.params:,}",
        "work per prefill": f"{report.flops / 1e9:,.1f} GFLOP",
        "prefill": f"{report.tokens_per_s:,.1f} tokens/s "
        f"(median {report.median_tokens_per_s:,.1f})",
        "rate": f"{report.gflops_per_s:,.1f} GFLOP/s",
        "matrix product": f"{report.matmul.gflops:,.1f} GFLOP/s "
        f"(size {report.matmul.size})",
        "part of it": f"{report.ratio:.0%}",
    }


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
