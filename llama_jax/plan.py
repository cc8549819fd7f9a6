"""`python -m llama_jax.plan`: whether a model fits, how fast it could be, on what.

By formula, in a second, before anything is downloaded or rented; and with `--compile`
by the real compiler, which needs no chips either.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, get_args

import jax

from llama_jax.checkpoint.model_folder import is_checkpoint, read_config
from llama_jax.cli import command as cli
from llama_jax.config import EXAMPLE_MODEL, PRESETS, LlamaConfig, parse_model
from llama_jax.errors import ConfigError
from llama_jax.planning.chips import CHIPS
from llama_jax.planning.compiled import Compiled
from llama_jax.planning.memory import Quantization, Task, Workload
from llama_jax.planning.report import MOST_SEQ, describe, lines, table, table_lines
from llama_jax.planning.search import Plan, advice, ranked, search
from llama_jax.planning.topology import Topology, local_topology, parse_topology
from llama_jax.runtime import CacheDType, DType, Remat
from llama_jax.sharding import parse_mesh


def main(argv: Sequence[str] | None = None) -> int:
    """Plan one piece of work, or all models on common hardware; 0 whatever fits."""
    args = parse_args(argv)
    if args.table:
        rows = table(args.seq)
        print(json.dumps(rows) if args.json else "\n".join(table_lines(rows)))
        return 0
    config = read_model(args.model, args.seq)
    topology = parse_topology(args.topology) if args.topology else local_topology()
    work = workload(args, config, topology)
    choices: dict[str, Any] = {
        "batch": args.batch,
        "remat": args.remat,
        "mesh": parse_mesh(args.mesh) if args.mesh else None,
    }
    tried: list[tuple[Plan, Compiled]] = []
    if args.compile:
        tried = compiled_plans(args, work, topology, choices)
        found = tried[-1][0]
        fits = tried[-1][1].fits
    else:
        found = search(work, topology, **choices)
        fits = found.fits
    hint = None if fits else advice(work, topology, batch=args.batch)
    if args.json:
        print(json.dumps(describe(args.model, found, hint, tried)))
    else:
        print("\n".join(lines(args.model, found, hint, tried)))
    return 0


def compiled_plans(
    args: argparse.Namespace,
    work: Workload,
    topology: Topology,
    choices: dict[str, Any],
) -> list[tuple[Plan, Compiled]]:
    """The best plan by formula and the compiler's answer; others if it does not fit.

    Raises:
      MeshError: the compiler is not installed, or knows no such chips.
    """
    # Formulas are to answer in a second, without all that the programs import.
    from llama_jax.planning.compiler import compile_first_that_fits, devices_of

    config = None
    if args.gpu_target_config:
        config = pathlib.Path(args.gpu_target_config).read_text("utf-8")
    devices: Sequence[Any] = jax.devices()
    if args.topology:
        devices = devices_of(topology, gpu_config=config)
    return compile_first_that_fits(ranked(work, topology, **choices), devices)


def read_model(text: str, seq: int | None) -> LlamaConfig:
    """A preset, a shape, or what a checkpoint's configuration says.

    Raises:
      ConfigError: it is none of them, or not understood.
      CheckpointError: it is a folder without a model.
    """
    path = pathlib.Path(text)
    if text in PRESETS or not (path.exists() or os.sep in text):
        return parse_model(text, seq or MOST_SEQ)
    if is_checkpoint(path):
        return read_config(path)
    from llama_jax import conversion

    return conversion.open_source(path).config


def workload(
    args: argparse.Namespace, config: LlamaConfig, topology: Topology
) -> Workload:
    """What the arguments ask for; batch and remat are searched for where not given.

    Raises:
      ConfigError: two of them contradict each other.
    """
    quantize: Quantization = args.quantize or (
        "int4" if args.task == "qlora" else "none"
    )
    if args.task in ("train", "lora") and quantize != "none":
        raise ConfigError(
            f"--quantize {quantize}: --task {args.task} holds weights unquantized; "
            "--task qlora trains adapters on quantized ones"
        )
    if args.task == "qlora" and quantize == "none":
        raise ConfigError(
            "--quantize none: --task qlora is that on whole weights: lora"
        )
    trains = args.task not in ("prefill", "decode")
    if args.remat and not trains:
        raise ConfigError(f"--remat: --task {args.task} has no backward pass")
    if args.cache_dtype and trains:
        raise ConfigError(
            f"--cache-dtype: --task {args.task} keeps no cache; --task decode and "
            "prefill do"
        )
    return Workload(
        config=config,
        task=args.task,
        batch=args.batch or 1,
        seq=args.seq or min(config.max_seq_len, MOST_SEQ),
        dtype=args.dtype or topology.chip.dtype,
        cache_dtype=args.cache_dtype,
        param_dtype=args.param_dtype,
        quantize=quantize,
        rank=args.lora_rank,
        remat=args.remat or ("block" if trains else "none"),
        flash=topology.chip.flash,
        gpu=topology.chip.is_gpu,
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; exits with status 2 where they contradict each other."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.plan",
        description="Whether a model fits, how fast it could be and what limits it, "
        "before anything is downloaded or rented. Mesh, batch and remat that are not "
        "given are searched for.",
        epilog="Sizes are in GB (10^9 bytes) and of each chip. Times follow from the "
        "makers' peak rates: no program is faster, and none has been run. Decoding "
        "counts a step, not the reading of prompts (--task prefill).",
    )
    group = parser.add_argument_group("what runs")
    group.add_argument(
        "--model",
        default="llama2-7b",
        help=f"a preset, a shape as in {EXAMPLE_MODEL}, or a checkpoint "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--task",
        choices=get_args(Task),
        default="decode",
        help="train all weights, train adapters (on quantized weights: qlora), read "
        "prompts, or write a token for each row (default: %(default)s)",
    )
    group.add_argument(
        "--batch",
        type=cli.positive,
        metavar="B",
        help="rows of the whole mesh (default: the best power of two)",
    )
    group.add_argument(
        "--seq",
        type=cli.positive,
        metavar="T",
        help="tokens of a row: of training or of a prompt, or slots of the cache "
        f"(default: the model's longest, at most {MOST_SEQ})",
    )
    group.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="of activations, the cache and weights that are not trained (default: "
        "bfloat16 where it is fast, else float16; float32 on CPUs)",
    )
    group.add_argument(
        "--cache-dtype",
        choices=get_args(CacheDType),
        help="of the cache, in place of --dtype: a byte for each number, and a scale "
        "for each slot and head",
    )
    group.add_argument(
        "--param-dtype",
        choices=get_args(DType),
        default="float32",
        help="of weights that are trained, their gradients and the optimizer's moments "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--quantize",
        choices=get_args(Quantization),
        help="how the layers' weights are held where they are not trained (default: "
        "none; qlora: int4)",
    )
    group.add_argument(
        "--remat",
        choices=get_args(Remat),
        help="what the backward pass computes again: nothing, all of a block, or all "
        "but its matrix products (default: the fastest that fits)",
    )
    group.add_argument(
        "--lora-rank",
        type=cli.positive,
        default=16,
        metavar="R",
        help="of adapters (default: %(default)s)",
    )
    group = parser.add_argument_group("where")
    group.add_argument(
        "--topology",
        metavar="NAME",
        help=f"chips: {', '.join(CHIPS)}; TPUs with a shape (v5e:4x4, v5p:2x2x2), GPUs "
        "with their number (h100:8) or hosts and GPUs of each (h100:2x8) (default: "
        "this machine)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help="how the chips are used, as in data=1,fsdp=-1,tensor=4; -1 takes what is "
        "left (default: the best)",
    )
    group = parser.add_argument_group("how it is answered")
    group.add_argument(
        "--compile",
        action="store_true",
        help="ask the real compiler too, which takes minutes and none of the chips; "
        "for TPUs `pip install libtpu`, for GPUs XLA's CUDA plugin (of what is "
        "searched for it tries the best plans by formula)",
    )
    group.add_argument(
        "--gpu-target-config",
        metavar="FILE",
        help="a GPU as the text of an XLA GpuTargetConfigProto, in place of what is "
        "known of the topology's",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--table",
        action="store_true",
        help="what fits where instead: every preset on common hardware",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="one JSON object: fits, bytes_per_chip by kind, limit_bytes, mesh, "
        "step_seconds_bound, tokens_per_second_bound, compiled, and what was chosen",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
