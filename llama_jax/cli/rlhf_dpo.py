"""`python -m llama_jax.rlhf dpo`: learn preferences without a reward model."""

from collections.abc import Sequence
from typing import get_args

from llama_jax.cli import preference_runs
from llama_jax.cli.parser import ArgumentParser, Rules, needs
from llama_jax.loading import Opened
from llama_jax.rlhf.direct_preference import DirectLoss, prefer_directly
from llama_jax.rlhf.preference_config import DirectConfig
from llama_jax.train.methods import Method

RULES: Rules = {
    **preference_runs.RULES,
    "--margins": needs("--loss", "dpo"),
}
"""When flags have an effect, by the settings of the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = ArgumentParser(
        prog="python -m llama_jax.rlhf dpo",
        description="Train a chat model on preferences without a reward model: make "
        "chosen answers likelier than rejected ones, relative to the initial model "
        "(direct preference optimization).",
        epilog="The output folder is that of a fine-tuning run, with model/ or "
        "adapter/. Ctrl-C and SIGTERM save and end the run; --resume continues it.",
        rules=RULES,
        check=False,
    )
    preference_runs.add_data_arguments(parser, batch_size=64)
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--loss",
        choices=get_args(DirectLoss),
        help="dpo, or ipo, which does not push a margin beyond 1 / (2 beta) "
        "(default: dpo)",
    )
    group.add_argument(
        "--beta",
        type=float,
        metavar="X",
        help="how strongly the model stays at the initial one (default: 0.1)",
    )
    preference_runs.add_run_arguments(parser, rate="1e-6; adapters 1e-5", warmup="3 %%")
    args = preference_runs.parse(parser, argv)
    result = preference_runs.train(args, DirectConfig, RULES, make_method)
    preference_runs.print_result(result, "dpo", args.output)
    return 0


def make_method(config: DirectConfig, opened: Opened) -> Method:
    """Make the method: all weights, or adapters, and the initial model as reference."""
    method = preference_runs.make_method(config, opened)
    return prefer_directly(method, loss=config.loss, beta=config.beta)
