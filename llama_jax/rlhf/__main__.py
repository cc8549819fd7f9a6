"""`python -m llama_jax.rlhf`: the stages of learning from human feedback."""

import argparse
import importlib
from collections.abc import Sequence

from llama_jax.cli import command as cli
from llama_jax.cli.parser import ArgumentParser

STAGES = {
    "ghost-attention": "make dialogs in which an instruction lasts",
    "reward": "train a reward model on preferences",
    "score": "score answers with a reward model",
    "dpo": "learn preferences without a reward model (DPO or IPO)",
    "rejection": "select the best of K answers to each prompt",
    "ppo": "optimize a policy for a reward (PPO, RLOO or GRPO)",
}
"""Stages and their purposes; a stage is `main` of `llama_jax.cli.rlhf_STAGE`."""


def main(argv: Sequence[str] | None = None) -> int:
    """List the stages, or run one of them."""
    parser = ArgumentParser(
        prog="python -m llama_jax.rlhf",
        usage="python -m llama_jax.rlhf STAGE ...",
        description="stages (each has its own --help):\n"
        + "\n".join(f"  {name:<17}{purpose}" for name, purpose in STAGES.items()),
    )
    parser.add_argument("stage", nargs="?", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.stage is None:
        parser.print_help()
        return 0
    module = f"llama_jax.cli.rlhf_{args.stage.replace('-', '_')}"
    status: int = importlib.import_module(module).main(args.rest)
    return status


if __name__ == "__main__":
    cli.run(main)
