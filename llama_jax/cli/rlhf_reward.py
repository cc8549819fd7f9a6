"""`python -m llama_jax.rlhf reward`: train a reward model on preferences."""

from collections.abc import Mapping, Sequence

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import preference_runs
from llama_jax.cli.parser import ArgumentParser
from llama_jax.loading import Opened
from llama_jax.rlhf.pairs import PairSource
from llama_jax.rlhf.preference_config import RewardConfig
from llama_jax.rlhf.reward_model import agreement, reward_loss, score_pairs
from llama_jax.rlhf.reward_report import agreement_facts, score_histogram
from llama_jax.train.methods import Method
from llama_jax.train.report import Table

RULES = preference_runs.RULES
"""When flags have an effect, by the settings of the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = ArgumentParser(
        prog="python -m llama_jax.rlhf reward",
        description="Train a reward model on preferences: a chat model with a scalar "
        "head, which gives chosen answers higher scores than rejected ones.",
        epilog="The output folder is that of a fine-tuning run, with the reward model "
        "in model/ (adapters and head in adapter/), for `rlhf score` and "
        "--reward-model. "
        "Ctrl-C and SIGTERM save and end the run; --resume continues it. Defaults are "
        "the settings of the Llama 2 paper.",
        rules=RULES,
        check=False,
    )
    preference_runs.add_data_arguments(parser, batch_size=512)
    parser.add_argument(
        "--safety-weight",
        type=float,
        metavar="X",
        help="weight of the loss of `chosen_safe` and `rejected_safe`, the "
        "cross-entropy of the score (default: 0)",
    )
    preference_runs.add_run_arguments(
        parser, rate="1e-5; adapters 1e-4", warmup="3 %%, at least 5"
    )
    args = preference_runs.parse(parser, argv)
    result = preference_runs.train(args, RewardConfig, RULES, make_method, measure)
    preference_runs.print_result(result, "reward", args.output)
    return 0


def make_method(config: RewardConfig, opened: Opened) -> Method:
    """Make the method: the model with a scalar head, which is random if it is new."""
    scalar = opened._replace(config=opened.config.replace(head="scalar"))
    loss = reward_loss(safety_weight=config.safety_weight)
    return preference_runs.make_method(config, scalar, loss)


def measure(loaded: Loaded, held_out: PairSource) -> Mapping[str, Table]:
    """Tables of how well a reward model agrees with held-out preferences."""
    scores = score_pairs(loaded, held_out)
    return {
        "Agreement with held-out preferences": [
            ("", ""),
            *agreement_facts(agreement(scores)).items(),
        ],
        "Scores of held-out answers": score_histogram(scores),
    }
