"""`python -m llama_jax.rlhf ppo`: optimize a policy for a reward."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import get_args

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli import prompt_files, reward_flags
from llama_jax.cli.parser import ArgumentParser, Rule, Rules, needs
from llama_jax.cli.progress import TerminalReporter, stop_on_signals
from llama_jax.cli.run_flags import add_lora_arguments
from llama_jax.errors import ConfigError
from llama_jax.loading import Opened, default_runtime, open_model
from llama_jax.model.lora import Lora
from llama_jax.model.quantize import PROJECTIONS
from llama_jax.model.transformer import model_for
from llama_jax.rlhf.optimization import PolicyMethod, optimize_policy
from llama_jax.rlhf.policy_config import Estimator, PolicyConfig
from llama_jax.rlhf.prompts import PromptSource
from llama_jax.rlhf.rewards import Prompt
from llama_jax.runtime import TRAINING_RULES, DType, Remat, Runtime
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.train.methods import train_adapters, train_weights
from llama_jax.train.run import run
from llama_jax.train.shared_base import train_critic_on
from llama_jax.weights import Kind

_GAE = Rule(
    lambda args: args.estimator in (None, "gae"),
    "without --estimator gae",
    "with --estimator gae",
)
RULES: Rules = {
    **reward_flags.RULES,
    "--critic": _GAE,
    "--critic-learning-rate": _GAE,
    "--clip-value": _GAE,
    "--discount": _GAE,
    "--decay": _GAE,
    "--lora-alpha": needs("--lora-rank"),
    "--quantize": needs("--lora-rank"),
}
"""When flags have an effect."""

# Fields of `PolicyConfig` that are flags, and their help.
_SETTINGS = {
    "steps": "iterations",
    "batch_size": "answers of an iteration",
    "mini_batch": "answers of an update",
    "passes": "passes over the answers of an iteration",
    "num_samples": "answers to each prompt",
    "accumulate": "parts of a mini-batch, processed one after another",
    "max_new_tokens": "most tokens of an answer",
    "seq_length": "slots of a prompt with its answer",
    "temperature": "of the samples; top-p and top-k would change what is trained",
    "kl_coefficient": "penalty of leaving the initial policy (beta)",
    "learning_rate": "rate of the policy",
    "critic_learning_rate": "rate of the critic",
    "clip_ratio": "limit of a token's change of probability (epsilon)",
    "clip_value": "limit of a value's change",
    "discount": "of later rewards (gamma)",
    "decay": "of later errors in the advantages (lambda)",
    "weight_decay": "of all weights but norms",
    "seed": "of prompts, samples and initial weights",
    "save_every": "iterations between checkpoints",
    "keep": "latest checkpoints to keep",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(argv)
    folder = pathlib.Path(args.output)
    names = {field.name for field in dataclasses.fields(PolicyConfig)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    config = PolicyConfig(**given)
    prompts = [p.content for p in prompt_files.read(args.input, args.on_bad)]
    if args.chat:
        prompts = [prompt_files.with_system(content, None) for content in prompts]
    opened = open_model(
        args.checkpoint, tokenizer=args.tokenizer, max_seq_len=args.max_seq_len
    )
    method = make_method(args, config, opened, prompts)
    source = PromptSource(len(prompts), config.prompts_per_step, config.seed)
    result = run(
        config,
        method,
        source,
        folder,
        resume=args.resume,
        tokenizer=opened.tokenizer,
        reporter=TerminalReporter(),
        signals=stop_on_signals,
    )
    print(f"{folder}: {result.path.name}, after {result.step} steps", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="python -m llama_jax.rlhf ppo",
        description="Optimize a policy for a reward: sample answers, reward them, and "
        "make better ones likelier (PPO with a critic, RLOO or GRPO).",
        epilog="The output folder is that of a fine-tuning run, and rollouts/ with the "
        "answers and rewards of every iteration. The same command with --resume "
        "continues a run. Defaults are those of the Llama 2 paper.",
        rules=RULES,
    )
    group = parser.add_argument_group("model")
    cli.add_checkpoint_argument(group)
    cli.add_model_arguments(group)
    group.add_argument(
        "--param-dtype",
        choices=get_args(DType),
        default="float32",
        help="of trained leaves and their moments (default: float32)",
    )
    add_lora_arguments(group)
    group.add_argument(
        "--quantize",
        choices=get_args(Kind),
        help="store the layers' frozen projections in eight or four bits",
    )
    group.add_argument(
        "--critic",
        metavar="DIR",
        help="initial critic: a reward model (default: the policy with a new head). "
        "With --lora-rank an adapter of `rlhf reward` on the same checkpoint",
    )
    group.add_argument(
        "--remat",
        choices=get_args(Remat),
        default="block",
        help="what the backward pass recomputes: nothing, all of a block, or all but "
        "its matrix products (default: %(default)s)",
    )
    group = parser.add_argument_group("data")
    prompt_files.add_input_argument(group, required=True)
    prompt_files.add_on_bad_argument(group)
    group.add_argument("--output", required=True, metavar="DIR", help="folder")
    group.add_argument("--resume", action="store_true", help="continue a run")
    group.add_argument("--chat", action="store_true", help="answer texts as messages")
    group.add_argument("--format", metavar="NAME", help=prompt_files.CHAT_FORMAT_HELP)
    reward_flags.add_reward_arguments(parser.add_argument_group("reward"))
    group = parser.add_argument_group("training")
    group.add_argument(
        "--estimator",
        choices=get_args(Estimator),
        help="of advantages: a critic (PPO), or other answers to the same prompt "
        "(default: gae)",
    )
    ours = {field.name: field.default for field in dataclasses.fields(PolicyConfig)}
    for name, text in _SETTINGS.items():
        default = ours[name]
        is_float = isinstance(default, float)
        shown = "" if default is None else f" (default: {default:g})"
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=float if is_float else int,
            metavar="X" if is_float else "N",
            required=name == "steps",
            help=f"{text}{shown}",
        )
    return parser.parse_args(argv)


def make_method(
    args: argparse.Namespace,
    config: PolicyConfig,
    opened: Opened,
    prompts: Sequence[Prompt],
) -> PolicyMethod:
    """Make what the run trains."""
    mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
    dtype = args.dtype or default_runtime().dtype
    runtime = Runtime(dtype=dtype, remat=args.remat, rules=TRAINING_RULES)
    trained = runtime.replace(param_dtype=args.param_dtype)
    if args.lora_rank is None:
        policy = train_weights(opened.config, trained, mesh=mesh, opened=opened)
    else:
        alpha = args.lora_alpha or 2.0 * args.lora_rank
        lora = Lora(rank=args.lora_rank, alpha=alpha, targets=PROJECTIONS)
        policy = train_adapters(
            opened,
            runtime,
            lora,
            mesh=mesh,
            quantize=args.quantize,
            dtype=args.param_dtype,
            seed=config.seed,
            base_model=args.checkpoint,
        )
    critic = None
    if config.estimator == "gae" and policy.lora is not None:
        critic = train_critic_on(
            policy, adapter=args.critic, dtype=args.param_dtype, seed=config.seed
        )
    elif config.estimator == "gae":
        start = opened if args.critic is None else open_critic(args.critic, opened)
        scalar = start.config.replace(head="scalar")
        critic = train_weights(
            scalar, trained, mesh=mesh, opened=start, seed=config.seed
        )
    inference = Runtime(dtype=dtype)
    reader = Loaded(model_for(opened.config, inference, mesh), {}, opened.tokenizer)
    return optimize_policy(
        config,
        policy,
        reward_flags.make_reward(args, reader, base=policy),
        prompts,
        opened.tokenizer,
        args.output,
        critic=critic,
        format=args.format,
    )


def open_critic(path: str, policy: Opened) -> Opened:
    """Open the critic's initial weights, which must read the policy's tokens."""
    critic = open_model(path)
    if critic.config.vocab_size != policy.config.vocab_size:
        raise ConfigError(
            f"--critic {path}: has {critic.config.vocab_size} token ids, but the "
            f"policy {policy.config.vocab_size}; give a critic of the same tokenizer"
        )
    return critic
