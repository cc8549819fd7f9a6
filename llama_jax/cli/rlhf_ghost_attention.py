"""`python -m llama_jax.rlhf ghost-attention`: dialogs in which an instruction lasts."""

import argparse
import pathlib
from collections.abc import Sequence

from llama_jax.cli import command as cli
from llama_jax.cli import prompt_files, sampling_flags
from llama_jax.cli.parser import ArgumentParser
from llama_jax.cli.processes import add_process_arguments, start_processes
from llama_jax.cli.progress import PromptBar
from llama_jax.data.line_file import read_lines
from llama_jax.data.prompts import Prompt
from llama_jax.distributed import is_main
from llama_jax.errors import DataError
from llama_jax.rlhf.ghost_attention import (
    Item,
    Problem,
    draw_instructions,
    read_instructions,
    sample_dialogs,
    to_records,
)
from llama_jax.rlhf.rejection import RECORDS, SAMPLES, write_records

_PROBLEMS: dict[Problem, str] = {
    "cut": "their last answer is cut at --max-new-tokens",
    "empty": "their last answer is empty",
    "long": "they do not fit the context",
    "tags": "an answer has special tags of the format",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(argv)
    start_processes(args, resume="the same command")
    folder = pathlib.Path(args.output)
    args.seed = prompt_files.choose_seed(args.seed, folder / SAMPLES)
    given = sampling_flags.given_settings(args)
    instructions = read_instructions(args.instructions)
    prompts = prompt_files.read(args.input, args.on_bad)
    items = make_items(prompts, instructions, args.per_dialog, args.seed)
    loaded = cli.load_model(args)
    sampling = sampling_flags.make_sampling(loaded, given)
    answer = prompt_files.dialog_request_maker(
        loaded,
        args.format,
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        sampling=sampling,
    )
    bar = PromptBar(len(items))
    try:
        sample_dialogs(
            loaded,
            items,
            answer,
            folder / SAMPLES,
            settings=prompt_files.run_facts(args, sampling),
            seed=args.seed,
            on_batch=bar.update,
        )
    finally:
        bar.close(folder / SAMPLES, args.seed)
    if is_main():
        records, problems = to_records(read_lines(folder / SAMPLES))
        write_records(folder / RECORDS, records)
        print(f"{len(records):,} records in {folder / RECORDS}")
        for problem, count in problems.items():
            print(f"{count:,} dialogs without one: {_PROBLEMS[problem]}")
        if not records:
            raise DataError("no dialog can be trained on; raise --max-new-tokens")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        prog="python -m llama_jax.rlhf ghost-attention",
        description="Answer dialogs with an instruction in every user turn, and write "
        "records for fine-tuning in which the first turn alone has it and the last "
        "answer alone is learnt (Ghost Attention).",
        epilog="The same command continues a run that was killed. Then train: "
        "python -m llama_jax.finetune --data DIR/records.jsonl",
        rules=sampling_flags.RULES,
    )
    group = parser.add_argument_group("model")
    cli.add_checkpoint_argument(group)
    cli.add_model_arguments(group)
    group = parser.add_argument_group("data")
    prompt_files.add_input_argument(group, required=True)
    prompt_files.add_on_bad_argument(group)
    group.add_argument(
        "--instructions",
        required=True,
        metavar="FILE",
        help="text with an instruction on each line, such as: Answer in one sentence.",
    )
    group.add_argument(
        "--per-dialog",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="instructions that are drawn for each dialog, each for a record of its "
        "own (default: 1)",
    )
    group.add_argument("--output", required=True, metavar="DIR", help="folder")
    group = parser.add_argument_group("prompt")
    group.add_argument("--format", metavar="NAME", help=prompt_files.FORMAT_HELP)
    sampling_flags.add_length_arguments(group, num_samples=None)
    parser.set_defaults(chat=True, system=None, num_samples=1)
    sampling_flags.add_sampling_arguments(parser)
    cli.add_storage_arguments(parser)
    add_process_arguments(parser)
    return parser.parse_args(argv)


def make_items(
    prompts: Sequence[Prompt], instructions: Sequence[str], per_dialog: int, seed: int
) -> list[Item]:
    """Draw instructions for dialogs."""
    return [
        Item(
            prompt.number * per_dialog + index,
            prompt_files.as_dialog(prompt.content),
            instruction,
        )
        for prompt in prompts
        for index, instruction in enumerate(
            draw_instructions(instructions, seed, prompt.number, per_dialog)
        )
    ]
