"""`python -m llama_jax.plan`: whether a model fits, how fast it could be, and where.

By formula within a second, before anything is downloaded or rented; with `--compile`
also by the real compiler, which needs no chips either.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, get_args

import jax

from llama_jax.checkpoint.model_folder import is_checkpoint, read_config
from llama_jax.cli import command as cli
from llama_jax.cli.parser import ArgumentParser, Rule, Rules, excludes, needs
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.model.presets import EXAMPLE_MODEL, PRESETS, parse_model
from llama_jax.planning.chips import CHIPS
from llama_jax.planning.compiled import CompiledPlan
from llama_jax.planning.policy import PolicyTask, PolicyWork, search_policy
from llama_jax.planning.report import describe, report_lines
from llama_jax.planning.search import Plan, advice, ranked_plans, search
from llama_jax.planning.table import DEFAULT_SEQ, table_lines, what_fits
from llama_jax.planning.topology import Topology, local_topology, parse_topology
from llama_jax.planning.workload import Quantization, Task, Workload
from llama_jax.runtime import CacheDType, DType, Remat
from llama_jax.sharding import parse_mesh

POLICY_SEQ = 1024
"""Slots of a prompt with its answer, unless they are given."""


class Fixed(NamedTuple):
    """Choices that the arguments fix; None if they are searched."""

    batch: int | None
    remat: Remat | None
    mesh: Mapping[str, int] | None


def main(argv: Sequence[str] | None = None) -> int:
    """Plan one workload, or print the table; 0 even if nothing fits."""
    args = parse_args(argv)
    if args.table:
        rows = what_fits(args.seq)
        print(json.dumps(rows) if args.json else "\n".join(table_lines(rows)))
        return 0
    config = read_model(args.model, args.seq)
    topology = parse_topology(args.topology) if args.topology else local_topology()
    if args.task in get_args(PolicyTask):
        report_policy(args, config, topology)
        return 0
    work = make_workload(args, config, topology)
    mesh = parse_mesh(args.mesh) if args.mesh else None
    fixed = Fixed(args.batch, args.remat, mesh)
    compiled: Sequence[CompiledPlan] = ()
    if args.compile:
        compiled = compile_plans(args, work, topology, fixed)
        plan, fits = compiled[-1].plan, compiled[-1].fits
    else:
        plan = search(work, topology, **fixed._asdict())
        fits = plan.fits
    hint = None if fits else advice(work, topology, batch=args.batch)
    if args.json:
        print(json.dumps(describe(args.model, plan, hint, compiled)))
    else:
        print("\n".join(report_lines(args.model, plan, hint, compiled)))
    return 0


def report_policy(
    args: argparse.Namespace, config: LlamaConfig, topology: Topology
) -> None:
    """Plan policy optimization, and print the plan.

    Raises:
      ConfigError: two arguments contradict each other.
      MeshError: no mesh divides the model, or the compiler is not installed.
    """
    # Imported late, as is the compiler.
    from llama_jax.planning.policy_report import describe_policy, policy_lines

    adapters = args.task == "ppo-lora"
    update = Workload(
        config=config,
        task="lora" if adapters else "train",
        batch=args.batch or 1,
        seq=args.seq or min(config.max_seq_len, POLICY_SEQ),
        dtype=args.dtype or topology.chip.dtype,
        param_dtype=args.param_dtype,
        quantize=args.quantize or "none",
        rank=args.lora_rank,
        remat=args.remat or "block",
        flash=topology.chip.flash,
        gpu=topology.chip.is_gpu,
    )
    work = PolicyWork(
        update=update, answers=args.answers, new_tokens=args.max_new_tokens
    )
    mesh = parse_mesh(args.mesh) if args.mesh else None
    plan = search_policy(work, topology, batch=args.batch, mesh=mesh)
    compiled = None
    if args.compile:
        from llama_jax.planning.policy_compiler import compile_policy

        compiled = compile_policy(plan, devices_of(args, topology))
    if args.json:
        print(json.dumps(describe_policy(args.model, plan, compiled)))
    else:
        print("\n".join(policy_lines(args.model, plan, compiled)))


def devices_of(args: argparse.Namespace, topology: Topology) -> Sequence[jax.Device]:
    """The devices to compile for.

    Raises:
      MeshError: the compiler is not installed, or does not know these chips.
    """
    from llama_jax.planning.target_devices import target_devices

    if not args.topology:
        return jax.devices()
    gpu_config = None
    if args.gpu_target_config:
        gpu_config = pathlib.Path(args.gpu_target_config).read_text("utf-8")
    return target_devices(topology, gpu_config=gpu_config)


def compile_plans(
    args: argparse.Namespace, work: Workload, topology: Topology, fixed: Fixed
) -> list[CompiledPlan]:
    """Compile the best plans by formula until one fits.

    Raises:
      MeshError: the compiler is not installed, or does not know these chips.
    """
    # Imported late: without --compile the answer should take a second.
    from llama_jax.planning.compiler import compile_first_that_fits

    plans: list[Plan] = ranked_plans(work, topology, **fixed._asdict())
    return compile_first_that_fits(plans, devices_of(args, topology))


def read_model(text: str, seq: int | None) -> LlamaConfig:
    """Read the configuration of a preset, a shape or a checkpoint.

    Raises:
      ConfigError: the text names none of them.
      CheckpointError: it is a folder without a model.
    """
    path = pathlib.Path(text)
    if text in PRESETS or not (path.exists() or os.sep in text):
        return parse_model(text, seq or DEFAULT_SEQ)
    if is_checkpoint(path):
        return read_config(path)
    from llama_jax import conversion

    return conversion.open_source(path).config


def make_workload(
    args: argparse.Namespace, config: LlamaConfig, topology: Topology
) -> Workload:
    """Make the workload of the arguments; `search` replaces its batch and remat.

    Raises:
      ConfigError: two arguments contradict each other.
    """
    task: Task = args.task
    quantize: Quantization = args.quantize or ("int4" if task == "qlora" else "none")
    if task == "qlora" and quantize == "none":
        raise ConfigError(
            "--quantize none: --task qlora quantizes weights; use --task lora"
        )
    trains = task not in ("prefill", "decode")
    return Workload(
        config=config,
        task=task,
        batch=args.batch or 1,
        seq=args.seq or min(config.max_seq_len, DEFAULT_SEQ),
        dtype=args.dtype or topology.chip.dtype,
        cache_dtype=args.cache_dtype,
        param_dtype=args.param_dtype,
        quantize=quantize,
        rank=args.lora_rank,
        remat=args.remat or ("block" if trains else "none"),
        flash=topology.chip.flash,
        gpu=topology.chip.is_gpu,
    )


def _plans_gpus(args: argparse.Namespace) -> bool:
    return bool(args.topology) and parse_topology(args.topology).chip.is_gpu


_ONE = excludes("--table")
_TRAINS = needs("--task", "train", "lora", "qlora", "ppo", "ppo-lora")
_POLICY = needs("--task", "ppo", "ppo-lora")
RULES: Rules = {
    "--answers": _POLICY,
    "--max-new-tokens": _POLICY,
    "--batch": _ONE,
    "--cache-dtype": (needs("--task", "prefill", "decode"), _ONE),
    "--compile": _ONE,
    "--dtype": _ONE,
    "--gpu-target-config": (
        needs("--compile"),
        Rule(_plans_gpus, "without a --topology of GPUs"),
    ),
    "--lora-rank": needs("--task", "lora", "qlora", "ppo-lora"),
    "--mesh": _ONE,
    "--model": _ONE,
    "--param-dtype": _TRAINS,
    "--quantize": (needs("--task", "qlora", "prefill", "decode", "ppo-lora"), _ONE),
    "--remat": _TRAINS,
    "--task": _ONE,
    "--topology": _ONE,
}
"""When flags have an effect."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments."""
    parser = ArgumentParser(
        prog="python -m llama_jax.plan",
        description="Compute whether a model fits, how fast it could be and what "
        "limits it, before anything is downloaded or rented. Searches for the best "
        "mesh, batch and remat unless they are given.",
        epilog="Sizes are in GB (10^9 bytes) per chip. Times are lower bounds from the "
        "vendors' peak rates; nothing is run. The step of decoding does not include "
        "reading the prompt (--task prefill). A flag without effect is refused.",
        rules=RULES,
    )
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--model",
        default="llama2-7b",
        help=f"a preset, a shape such as {EXAMPLE_MODEL}, or a checkpoint "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--task",
        choices=(*get_args(Task), *get_args(PolicyTask)),
        default="decode",
        help="train all weights, train LoRA adapters (qlora: on quantized weights), "
        "read prompts, generate one token per row, or optimize a policy with a critic, "
        "a reference and a reward model (ppo-lora: adapters on one set of weights) "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--batch",
        type=cli.positive_int,
        metavar="B",
        help="rows of the whole mesh (default: the best power of two)",
    )
    group.add_argument(
        "--answers",
        type=cli.positive_int,
        default=512,
        metavar="N",
        help="of an iteration of policy optimization (default: %(default)s)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=cli.positive_int,
        default=256,
        metavar="N",
        help="of an answer in policy optimization (default: %(default)s)",
    )
    group.add_argument(
        "--seq",
        type=cli.positive_int,
        metavar="T",
        help="tokens per row in training and prefill; slots of the cache in decoding "
        f"(default: the model's context, at most {DEFAULT_SEQ}; of a prompt with its "
        f"answer in policy optimization at most {POLICY_SEQ})",
    )
    group.add_argument(
        "--dtype",
        choices=get_args(DType),
        help="dtype of activations, cache and frozen weights (default: bfloat16 where "
        "it is fast, else float16; float32 on CPUs)",
    )
    group.add_argument(
        "--cache-dtype",
        choices=get_args(CacheDType),
        help="dtype of the cache if not --dtype; int8 has a scale per slot and head",
    )
    group.add_argument(
        "--param-dtype",
        choices=get_args(DType),
        default="float32",
        help="dtype of trained weights, their gradients and the optimizer's moments "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--quantize",
        choices=get_args(Quantization),
        help="quantization of the layers' frozen weights (default: none; qlora: int4)",
    )
    group.add_argument(
        "--remat",
        choices=get_args(Remat),
        help="what the backward pass recomputes: nothing, all of a block, or all but "
        "its matrix products (default: the fastest that fits)",
    )
    group.add_argument(
        "--lora-rank",
        type=cli.positive_int,
        default=16,
        metavar="R",
        help="rank of LoRA adapters (default: %(default)s)",
    )
    group = parser.add_argument_group("hardware")
    group.add_argument(
        "--topology",
        metavar="NAME",
        help=f"chips: {', '.join(CHIPS)}; TPUs with a shape (v5e:4x4, v5p:2x2x2), GPUs "
        "with a number (h100:8) or hosts and GPUs per host (h100:2x8) (default: this "
        "machine)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help="how the chips are used, such as data=1,fsdp=-1,tensor=4; -1 takes the "
        "remaining chips (default: the best)",
    )
    group = parser.add_argument_group("compilation")
    group.add_argument(
        "--compile",
        action="store_true",
        help="also compile the program, which takes minutes and needs none of the "
        "chips; for TPUs `pip install libtpu`, for GPUs XLA's CUDA plugin (tries the "
        "best plans by formula until one fits)",
    )
    group.add_argument(
        "--gpu-target-config",
        metavar="FILE",
        help="the text of an XLA GpuTargetConfigProto that describes the GPU, instead "
        "of the built-in description",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--table",
        action="store_true",
        help="instead print what fits where: every preset on common hardware",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: fits, bytes_per_chip by kind, limit_bytes, mesh, "
        "step_seconds_bound, tokens_per_second_bound, compiled, and the choices made",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
