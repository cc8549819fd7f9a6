"""The flags of any training run; their defaults are None."""

from typing import get_args

from llama_jax.cli import command as cli
from llama_jax.cli.command import Group
from llama_jax.runtime import DType, Remat
from llama_jax.train.optimizer import OptimizerName, ScheduleName


def add_training_arguments(
    group: Group,
    *,
    epochs: str = "1",
    learning_rate: str,
    warmup: str,
    weight_decay: str = "0.1; adapters 0",
    seeded: str = "data order and initial weights",
) -> None:
    """Add the flags of how a run trains; the texts are defaults, and what is seeded."""
    group.add_argument(
        "--epochs",
        type=cli.positive_int,
        metavar="E",
        help=f"passes over the data (default: {epochs})",
    )
    group.add_argument(
        "--steps",
        type=cli.positive_int,
        metavar="N",
        help="total steps, instead of --epochs",
    )
    group.add_argument(
        "--accumulate",
        type=cli.positive_int,
        metavar="G",
        help="parts of a batch that are processed one after another, to save memory "
        "(default: 1)",
    )
    group.add_argument(
        "--optimizer", choices=get_args(OptimizerName), help="(default: adamw)"
    )
    group.add_argument(
        "--learning-rate",
        type=float,
        metavar="RATE",
        help=f"peak rate (default: {learning_rate})",
    )
    group.add_argument(
        "--schedule",
        choices=get_args(ScheduleName),
        help="decay after the peak (default: cosine)",
    )
    group.add_argument(
        "--final",
        type=float,
        metavar="FRACTION",
        help="rate at the end of the decay, as a fraction of the peak (default: 0.1)",
    )
    group.add_argument(
        "--warmup",
        type=int,
        metavar="N",
        help=f"steps of warm-up (default: {warmup})",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        metavar="X",
        help=f"of all weights but norms (default: {weight_decay})",
    )
    group.add_argument(
        "--clip",
        type=float,
        metavar="X",
        help="maximum of the global gradient norm; 0 is no limit (default: 1)",
    )
    group.add_argument(
        "--param-dtype",
        choices=get_args(DType),
        help="of trained weights and their moments (default: float32)",
    )
    group.add_argument(
        "--remat",
        choices=get_args(Remat),
        help="what the backward pass recomputes: nothing, blocks, or all of a block "
        "but its matrix products (default: block)",
    )
    group.add_argument(
        "--seed",
        type=int,
        help=f"of {seeded} (default: 0)",
    )
    group.add_argument(
        "--max-skipped",
        type=int,
        metavar="N",
        help="steps with a loss or gradient that is not finite, after which the run "
        "ends; such steps are skipped and their batches saved (default: 10)",
    )


def add_output_arguments(group: Group) -> None:
    """Add the flags of what a run saves and logs."""
    group.add_argument(
        "--save-dtype",
        choices=get_args(DType),
        help="dtype of the saved model (default: --param-dtype)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in --output; flags default to those of "
        "the run, and --mesh may change",
    )
    for flag, what in (
        ("--save-every", "checkpoints"),
        ("--eval-every", "evaluations (also at start and end)"),
    ):
        group.add_argument(
            flag,
            type=cli.positive_int,
            metavar="N",
            help=f"steps between {what} (default: 100)",
        )
    group.add_argument(
        "--keep",
        type=cli.positive_int,
        metavar="N",
        help="latest checkpoints to keep, besides the best (default: 2)",
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


def add_lora_arguments(group: Group) -> None:
    """Add the flags of adapters; without --lora-rank all weights are trained."""
    group.add_argument(
        "--lora-rank",
        type=cli.positive_int,
        metavar="R",
        help="train adapters of this rank on frozen weights (default: all weights)",
    )
    group.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="adapters are scaled by A / R (default: 2 R)",
    )
