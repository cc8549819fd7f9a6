"""`python -m llama_jax.rlhf rejection`: the best of K answers to each prompt."""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence

from llama_jax.checkpoint.atomic_write import write_file
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli import prompt_files, reward_flags, sampling_flags
from llama_jax.cli.parser import ArgumentParser, Rules
from llama_jax.cli.processes import add_process_arguments, start_processes
from llama_jax.cli.progress import PromptBar
from llama_jax.data.line_file import read_lines
from llama_jax.data.prompts import Prompt
from llama_jax.distributed import is_main
from llama_jax.errors import ConfigError, DataError
from llama_jax.generation.prompt_file import make_requests, prompt_seed
from llama_jax.generation.sampling import Sampling
from llama_jax.rlhf.rejection import (
    RECORDS,
    SAMPLES,
    Candidate,
    Selection,
    Work,
    prompt_key,
    read_earlier,
    sample_and_score,
    select,
    write_records,
)
from llama_jax.rlhf.rejection_report import curve_table, draw_curves, reward_curves

RULES: Rules = {**sampling_flags.RULES, **reward_flags.RULES}
"""When flags have an effect."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(argv)
    start_processes(args, resume="the same command")
    folder = pathlib.Path(args.output)
    args.seed = prompt_files.choose_seed(args.seed, folder / SAMPLES)
    given = sampling_flags.given_settings(args)
    prompts = prompt_files.read(args.input, args.on_bad)
    earlier = [read_earlier(path) for path in args.keep_from]
    loaded = cli.load_model(args)
    sampling = sampling_flags.make_sampling(loaded, given)
    temperatures = args.temperature or [sampling.temperature]
    check_temperatures(temperatures, args.num_samples)
    reward = reward_flags.make_reward(args, loaded)
    works = make_works(loaded, prompts, args, sampling, temperatures, earlier)
    facts = prompt_files.run_facts(args, sampling)
    facts |= {"temperature": temperatures, "reward": reward.name}
    bar = PromptBar(len(works))
    try:
        sample_and_score(
            loaded,
            works,
            reward,
            folder / SAMPLES,
            settings=facts,
            on_batch=bar.update,
        )
    finally:
        bar.close(folder / SAMPLES, args.seed)
    if is_main():
        report(folder, args)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="python -m llama_jax.rlhf rejection",
        description="Sample K answers to each prompt, score them with a reward, and "
        "write the best ones as records for fine-tuning (rejection sampling).",
        epilog="The same command continues a run that was killed. Then train: "
        "python -m llama_jax.finetune --data DIR/records.jsonl",
        rules=RULES,
    )
    group = parser.add_argument_group("model")
    cli.add_checkpoint_argument(group)
    cli.add_model_arguments(group)
    group = parser.add_argument_group("data")
    prompt_files.add_input_argument(group, required=True)
    prompt_files.add_on_bad_argument(group)
    group.add_argument("--output", required=True, metavar="DIR", help="folder")
    group.add_argument(
        "--keep-from",
        nargs="+",
        default=[],
        metavar="DIR",
        help="outputs of earlier rounds, whose best answers compete too; they are "
        "scored again",
    )
    group.add_argument(
        "--allow-cut",
        action="store_true",
        help="select answers too that --max-new-tokens cut",
    )
    group = parser.add_argument_group("prompt")
    group.add_argument("--chat", action="store_true", help="answer texts as messages")
    group.add_argument(
        "--format",
        metavar="NAME",
        help=prompt_files.CHAT_FORMAT_HELP,
    )
    group.add_argument(
        "--system-prompt",
        dest="system",
        metavar="TEXT",
        help="system message that the records lack, so that training teaches to do "
        "without it (context distillation); implies --chat",
    )
    sampling_flags.add_length_arguments(group, num_samples=8)
    reward_flags.add_reward_arguments(parser.add_argument_group("reward"))
    sampling_flags.add_sampling_arguments(parser, several_temperatures=True)
    cli.add_storage_arguments(parser)
    add_process_arguments(parser)
    return parser.parse_args(argv)


def check_temperatures(temperatures: Sequence[float], num_samples: int) -> None:
    """Raise a `ConfigError` if answers would be equal."""
    if len(set(temperatures)) < len(temperatures):
        raise ConfigError("--temperature: has a number twice; remove it")
    if 0 in temperatures and num_samples > 1:
        raise ConfigError(
            f"--temperature 0: all {num_samples} answers to a prompt would be equal; "
            "use more than 0, or --num-samples 1"
        )


def make_works(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
    sampling: Sampling,
    temperatures: Sequence[float],
    earlier: Sequence[Mapping[str, Candidate]],
) -> list[Work]:
    """Make the requests of every prompt, with the best answers of earlier rounds."""
    maker = functools.partial(
        prompt_files.request_maker,
        loaded,
        args.format,
        chat=prompt_files.is_dialog(args),
        max_new_tokens=args.max_new_tokens,
        num_samples=args.num_samples,
        stop=args.stop,
        sampling=sampling,
    )
    plain = maker(None)
    dropped = prompt_files.Dropped()
    pairs = make_requests(
        loaded,
        prompts,
        maker(args.system),
        seed=args.seed,
        on_problem=dropped if args.on_bad == "drop" else None,
    )
    dropped.report()
    known = {prompt_key(prompt.content) for prompt, _ in pairs}
    if others := sum(key not in known for best in earlier for key in best):
        print(
            f"{others:,} records of --keep-from are of prompts that --input lacks, and "
            "are left out",
            file=sys.stderr,
        )
    works = []
    for prompt, request in pairs:
        seed = request.sampling.seed
        requests = [
            dataclasses.replace(
                request,
                sampling=dataclasses.replace(
                    sampling, temperature=temperature, seed=prompt_seed(seed, number)
                ),
            )
            for number, temperature in enumerate(temperatures)
        ]
        shown = request if args.system is None else plain(prompt)
        ids = [int(id) for id in shown.prompt_ids]
        key = prompt_key(prompt.content)
        kept = [
            best[key]._replace(answer=best[key].answer._replace(prompt_ids=ids))
            for best in earlier
            if key in best
        ]
        works.append(Work(prompt, ids, requests, kept))
    return works


def report(folder: pathlib.Path, args: argparse.Namespace) -> None:
    """Write records and numbers, and print them."""
    selection = select(read_lines(folder / SAMPLES), allow_cut=args.allow_cut)
    curves = reward_curves(read_lines(folder / SAMPLES))
    write_records(folder / RECORDS, selection.records)
    table = curve_table(curves)
    numbers = {f"{t:g}": curve._asdict() for t, curve in curves.items()}
    write_file(folder / "report.json", json.dumps(numbers, indent=2) + "\n")
    drawn = draw_curves(folder / "rewards.png", curves)
    picture = "![max and median reward](rewards.png)\n\n" if drawn else ""
    write_file(folder / "report.md", f"# Reward against K\n\n{picture}{table}\n")
    print(table)
    for temperature, curve in curves.items():
        print(
            f"temperature {temperature:g}: {curve.cut:.1%} of the answers are cut at "
            f"--max-new-tokens {args.max_new_tokens}; {curve.tokens:.0f} tokens each"
        )
    print(summary(selection, folder))
    if not selection.records:
        raise DataError(
            f"no answer ended within --max-new-tokens {args.max_new_tokens} with any "
            "text, so there is no record; raise it, or give --allow-cut"
        )


def summary(selection: Selection, folder: pathlib.Path) -> str:
    """Describe a selection in one line."""
    parts = [f"{len(selection.records):,} records in {folder / RECORDS}"]
    if selection.earlier:
        parts.append(f"{selection.earlier:,} of them from earlier rounds")
    if selection.without_answer:
        parts.append(
            f"{selection.without_answer:,} prompts without one, as all answers are "
            "cut or empty"
        )
    return "; ".join(parts)
