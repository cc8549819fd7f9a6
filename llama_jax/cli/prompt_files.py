"""`sample --input`: the prompts of files, completed into a file."""

import argparse
import dataclasses
import functools
import secrets
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli.command import Group
from llama_jax.cli.output import print_format_note
from llama_jax.cli.progress import PromptBar
from llama_jax.data.line_file import read_lines
from llama_jax.data.prompts import Prompt, read_prompts
from llama_jax.data.records import OnBad
from llama_jax.distributed import broadcast_from_main, is_main
from llama_jax.errors import DataError, LlamaJaxError, PromptError
from llama_jax.generation.prompt_file import complete_prompts, make_requests
from llama_jax.generation.request import (
    Request,
    Settings,
    chat_request,
    text_request,
)
from llama_jax.generation.sampling import Sampling
from llama_jax.text.dialogs import Dialog, Message, PromptFormat
from llama_jax.text.prompt_formats import (
    FORMATS,
    default_format,
    get_format,
)
from llama_jax.types import Path

FORMAT_HELP = (
    f"prompt format: {', '.join(FORMATS)}, template (the checkpoint's "
    "chat template) or template:NAME (default: template if there is one, otherwise "
    "that of Meta's chat models)"
)
"""Help of --format."""
CHAT_FORMAT_HELP = f"implies --chat; {FORMAT_HELP}"
"""The same in commands with --chat."""

_SHOWN = 3


def read(files: Sequence[str], on_bad: OnBad) -> list[Prompt]:
    """Read the prompts of files; say what is dropped and which answers are not read."""
    dropped = Dropped()
    prompts = read_prompts(files, on_bad=on_bad, on_problem=dropped)
    dropped.report()
    if not prompts:
        raise DataError(f"--input: no record of {', '.join(files)} is a prompt")
    if answered := sum(prompt.answered for prompt in prompts):
        print(
            f"{answered:,} of {len(prompts):,} records have an answer, which the model "
            "does not see",
            file=sys.stderr,
        )
    return prompts


class Dropped:
    """Prints the first errors of dropped records, and counts all."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, error: LlamaJaxError) -> None:
        """Count an error."""
        self._count += 1
        if self._count <= _SHOWN:
            print(f"dropped: {error}", file=sys.stderr)

    def report(self) -> None:
        """Print the count, if not every error was printed."""
        if self._count > _SHOWN:
            print(f"dropped: {self._count:,} records in all", file=sys.stderr)


def choose_seed(given: int | None, output: Path | None) -> int:
    """Return the seed of a run, the same in all processes.

    Args:
      given: of the command line.
      output: file that a run with its own seed may have begun.

    Returns:
      The given seed, else that of the file, else a random one.
    """
    if given is not None:
        return given
    seed = secrets.randbits(32)
    if output is not None and is_main():
        line = next(read_lines(output), {})
        seed = line.get("settings", {}).get("seed", seed)
    return broadcast_from_main(seed)


def is_dialog(args: argparse.Namespace) -> bool:
    """Whether a text is a message to answer, not a text to continue."""
    return bool(args.chat or args.format or args.system is not None)


def add_input_argument(group: Group, *, required: bool = False) -> None:
    """Add --input."""
    group.add_argument(
        "--input",
        nargs="+",
        required=required,
        metavar="FILE",
        help="files of prompts, each with a text to continue or a dialog to answer: "
        ".jsonl, .json, .txt, each also with .gz; .parquet",
    )


def add_on_bad_argument(group: Group) -> None:
    """Add --on-bad."""
    group.add_argument(
        "--on-bad",
        choices=get_args(OnBad),
        default="refuse",
        help="what to do with a record that is no prompt, or too long a one; dropped "
        "ones are named with file and line (default: refuse)",
    )


def dialog_request_maker(
    loaded: Loaded, format: str | None, **settings: Any
) -> Callable[[Dialog], Request]:
    """Return a function that makes the request which answers a dialog.

    Args:
      loaded: its tokenizer encodes.
      format: prompt format of dialogs; None is the model's.
      **settings: of every request.
    """
    tokenizer = loaded.tokenizer

    @functools.cache
    def style() -> PromptFormat:
        print_format_note(tokenizer, format)
        return get_format(format, tokenizer) if format else default_format(tokenizer)

    def make(dialog: Dialog) -> Request:
        return chat_request(tokenizer, dialog, format=style(), **settings)

    return make


def request_maker(
    loaded: Loaded,
    format: str | None,
    system: str | None,
    *,
    chat: bool,
    **settings: Any,
) -> Callable[[Prompt], Request]:
    """Return a function that makes the request of a prompt.

    Args:
      loaded: its tokenizer encodes.
      format: prompt format of dialogs; None is the model's.
      system: system message of every dialog.
      chat: answer texts as messages too.
      **settings: of every request.
    """
    answer = dialog_request_maker(loaded, format, **settings)

    def make(prompt: Prompt) -> Request:
        content = prompt.content
        if isinstance(content, str) and not chat:
            return text_request(loaded.tokenizer, content, **settings)
        return answer(with_system(content, system))

    return make


def as_dialog(content: str | Sequence[Message]) -> list[Message]:
    """Make the dialog of a prompt; a text is a user's message."""
    if isinstance(content, str):
        return [Message(role="user", content=content)]
    return list(content)


def with_system(content: str | Sequence[Message], system: str | None) -> list[Message]:
    """Make the dialog of a prompt, with a system message if there is one."""
    content = as_dialog(content)
    if system is None:
        return content
    if content[0]["role"] == "system":
        raise PromptError(
            "has a system message of its own, and another one is given; remove one"
        )
    return [Message(role="system", content=system), *content]


def complete(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
    settings: Settings,
) -> None:
    """Complete prompts into `args.output`, with a progress bar."""
    dropped = Dropped()
    pairs = make_requests(
        loaded,
        prompts,
        request_maker(
            loaded,
            args.format,
            args.system,
            chat=is_dialog(args),
            **settings,
        ),
        seed=args.seed,
        on_problem=dropped if args.on_bad == "drop" else None,
    )
    dropped.report()
    bar = PromptBar(len(pairs))
    facts = run_facts(args, settings["sampling"])
    try:
        complete_prompts(
            loaded, pairs, args.output, settings=facts, on_batch=bar.update
        )
    finally:
        bar.close(args.output, args.seed)


def run_facts(args: argparse.Namespace, sampling: Sampling) -> dict[str, object]:
    """Return the settings that completions depend on, without those without effect."""
    names = ("adapter", "quantize", "format", "system", "stop", "max_new_tokens")
    facts = {name: vars(args)[name] for name in names if vars(args)[name]}
    facts |= {"checkpoint": args.checkpoint or "bundled"}
    if is_dialog(args):
        facts["chat"] = True
    facts["num_samples"] = args.num_samples
    ours = dataclasses.asdict(Sampling())
    always = ("temperature", "top_p", "seed")
    return facts | {
        name: value
        for name, value in dataclasses.asdict(sampling).items()
        if name in always or value != ours[name]
    }
