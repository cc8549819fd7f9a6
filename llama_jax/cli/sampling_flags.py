"""The flags of how tokens are drawn, and the settings that they make."""

import argparse
import sys
from typing import Any

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli.parser import Rule, Rules, refuse_unused
from llama_jax.generation.request import default_sampling
from llama_jax.generation.sampling import Sampling

_FLAGS = {
    "temperature": "0 takes the likeliest token",
    "top_p": "keep the likeliest tokens up to this probability mass",
    "top_k": "keep this many of the likeliest tokens; 0 keeps all",
    "min_p": "keep tokens this likely, relative to the likeliest",
    "repetition_penalty": "above 1 avoids tokens of the prompt and completion",
    "presence_penalty": "above 0 avoids tokens of the completion",
    "frequency_penalty": "the same, for each time they occur",
}
"""Fields of `Sampling` that are flags, and their help."""

_RANDOM = Rule(lambda args: args.temperature not in (0, [0]), "with --temperature 0")
RULES: Rules = {"--min-p": _RANDOM, "--top-k": _RANDOM, "--top-p": _RANDOM}
"""When the flags have an effect."""


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, several_temperatures: bool = False
) -> None:
    """Add a flag for each setting, and --seed.

    Args:
      parser: of the command.
      several_temperatures: let --temperature take a list.
    """
    group = parser.add_argument_group(
        "sampling", "The checkpoint's own settings, where it has them, come first."
    )
    ours = Sampling()
    for name, text in _FLAGS.items():
        default = getattr(ours, name)
        several = several_temperatures and name == "temperature"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            nargs="+" if several else None,
            metavar="X" if isinstance(default, float) else "N",
            help=f"{text}{'; several are compared' if several else ''} "
            f"(default: {default})",
        )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the random numbers (default: random; it is printed)",
    )


def add_length_arguments(group: cli.Group, *, num_samples: int | None = 1) -> None:
    """Add --max-new-tokens, --num-samples and --stop.

    Args:
      group: where they are added.
      num_samples: default of --num-samples; None does not add it.
    """
    group.add_argument(
        "--max-new-tokens",
        type=cli.positive_int,
        default=512,
        metavar="N",
        help="most tokens of a completion (default: 512)",
    )
    if num_samples is not None:
        group.add_argument(
            "--num-samples",
            type=cli.positive_int,
            default=num_samples,
            metavar="N",
            help=f"completions of the prompt (default: {num_samples})",
        )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STR",
        help="end a completion before this text; may be repeated",
    )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that flags give, checked; of temperatures the first.

    Raises:
      PromptError: a setting is out of range.
    """
    given = {name: vars(args)[name] for name in (*_FLAGS, "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(temperatures := given.get("temperature"), list):
        for temperature in temperatures:
            Sampling(temperature=temperature)
        given["temperature"] = temperatures[0]
    Sampling(**given)
    return given


def make_sampling(loaded: Loaded, given: dict[str, Any]) -> Sampling:
    """Add the checkpoint's settings to given ones, and say which they are.

    Raises:
      ConfigError: a given setting has no effect with the checkpoint's temperature.
    """
    sampling = default_sampling(loaded.tokenizer, **given)
    own = loaded.tokenizer.settings.sampling
    if taken := [f"{name} {own[name]}" for name in own if name not in given]:
        print(f"sampling of the checkpoint: {', '.join(taken)}", file=sys.stderr)
    if "temperature" not in given:
        flags = [f"--{name.replace('_', '-')}" for name in given]
        refuse_unused(RULES, flags, sampling)
    return sampling
