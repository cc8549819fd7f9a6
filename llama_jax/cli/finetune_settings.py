"""The flags of `python -m llama_jax.finetune`, their defaults, and what a resumed run
takes over from the one before.
"""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

from llama_jax.checkpoint.json_files import read_json
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, TrainError
from llama_jax.model.quantize import PROJECTIONS

RUN = "run.json"

# Llama 2's fine-tuning (arXiv:2307.09288, 3.1): 2e-5, cosine, decay 0.1, batches of 64
# sequences of 4096, two epochs. From scratch (2.2): 3e-4 and 2000 steps of warm-up.
# Adapters take ten times the rate of weights (arXiv:2106.09685; 2305.14314, B: 2e-4 and
# batches of 16) and no decay, which would pull at what they add.
_ALL: dict[str, Any] = {
    "method": "full",
    "format": "text",
    "batch_size": 64,
    "accumulate": 1,
    "packing": "pack",
    "on_long": "drop",
    "on_bad": "refuse",
    "infilling_rate": 0.9,
    "optimizer": "adamw",
    "schedule": "cosine",
    "final": 0.1,
    "clip": 1.0,
    "param_dtype": "float32",
    "remat": "block",
    "seed": 0,
    "eval_every": 100,
    "save_every": 100,
    "sample_every": 100,
    "sample_tokens": 128,
    "keep": 2,
    "max_skipped": 10,
}
_FULL = {"learning_rate": 2e-5, "weight_decay": 0.1}
_SCRATCH = {"learning_rate": 3e-4, "weight_decay": 0.1}
_LORA: dict[str, Any] = {
    "learning_rate": 2e-4,
    "weight_decay": 0.0,
    "batch_size": 16,
    "lora_rank": 16,
    "lora_alpha": 32.0,
    "lora_targets": list(PROJECTIONS),
}
_LONGEST = 4096

# Another value would make another run of it; those of the data, Loader checks too.
_MATTERS = (
    "method", "lora_rank", "lora_alpha", "lora_targets", "quantize", "format",
    "seq_length", "batch_size", "packing", "on_long", "on_bad", "infilling_rate",
    "optimizer", "learning_rate", "schedule", "final", "warmup", "epochs", "steps",
    "weight_decay", "clip", "dtype", "param_dtype", "seed", "rope_theta",
    "max_seq_len", "from_scratch", "preset",
)  # fmt: skip
_OF_THIS_CALL = (
    "output", "resume", "show_batch", "coordinator", "num_processes", "process_id",
)  # fmt: skip


def read_run(output: pathlib.Path) -> dict[str, Any] | None:
    """What a run in this folder wrote about itself, None where there was none."""
    file = output / RUN
    return read_json(file) if file.is_file() else None


def taken_over(args: argparse.Namespace, before: Mapping[str, Any]) -> None:
    """Fill in what was not given with what the run was begun with.

    Raises:
      TrainError: a setting that matters was another one then.
    """
    for name, value in before.items():
        if name in _OF_THIS_CALL or not hasattr(args, name):
            continue
        given = getattr(args, name)
        if given is None:
            setattr(args, name, value)
        elif name in _MATTERS and given != value:
            raise TrainError(
                f"--{name.replace('_', '-')} is {_written(given)}, but this run was "
                f"begun with {_written(value)}; resume without the flag, or begin anew "
                "in another --output"
            )


def complete(args: argparse.Namespace, config: LlamaConfig) -> None:
    """Fill in what nobody chose, and check what only the model can tell.

    Raises:
      ConfigError: a choice makes no sense.
    """
    method = args.method or _ALL["method"]
    own = _SCRATCH if args.from_scratch else _FULL if method == "full" else _LORA
    defaults = _ALL | own | {"seq_length": min(_LONGEST, config.max_seq_len)}
    if method == "qlora":
        defaults["quantize"] = "nf4"
    if args.steps is None:
        defaults["epochs"] = 1 if args.from_scratch else 2
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.seq_length > config.max_seq_len:
        raise ConfigError(
            f"--seq-length {args.seq_length} is more than the model's context of "
            f"{config.max_seq_len}; lower it, or raise --max-seq-len (and --rope-theta)"
        )
    if args.batch_size % args.accumulate:
        raise ConfigError(
            f"--batch-size {args.batch_size} cannot be cut into --accumulate "
            f"{args.accumulate} equal parts"
        )


def warmup_of(args: argparse.Namespace, steps: int) -> int:
    """Steps of warm-up: 3 %, from scratch 10 % but at most the paper's 2000."""
    if args.warmup is not None:
        return int(args.warmup)
    return min(2000, steps // 10) if args.from_scratch else steps * 3 // 100


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run takes over, for JSON."""
    return {
        name: value for name, value in vars(args).items() if name not in _OF_THIS_CALL
    }


def _written(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "not given" if value is None else str(value)
