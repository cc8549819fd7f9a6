"""`sample --input`: the prompts of files, completed into a file."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli.progress import PromptBar
from llama_jax.data.line_file import LineFile
from llama_jax.data.prompts import Prompt, read_prompts
from llama_jax.data.records import OnBad
from llama_jax.errors import DataError, LlamaJaxError, PromptError
from llama_jax.generation.prompt_file import complete_prompts, make_requests
from llama_jax.generation.request import (
    Request,
    Settings,
    chat_request,
    text_request,
)
from llama_jax.generation.sampling import Sampling
from llama_jax.text.dialogs import Message
from llama_jax.types import JsonObject

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


def stored_seed(output: str) -> int | None:
    """Return the seed of the run that wrote a file; None if there is none."""
    for line in LineFile(output).read():
        seed = line.get("settings", {}).get("seed")
        return seed if isinstance(seed, int) else None
    return None


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

    def make(prompt: Prompt) -> Request:
        content = prompt.content
        if isinstance(content, str) and not chat:
            return text_request(loaded.tokenizer, content, **settings)
        messages = with_system(content, system)
        return chat_request(loaded.tokenizer, messages, format=format, **settings)

    return make


def with_system(content: str | Sequence[Message], system: str | None) -> list[Message]:
    """Make the dialog of a prompt, with a system message if there is one."""
    if isinstance(content, str):
        content = [Message(role="user", content=content)]
    if system is None:
        return list(content)
    if content[0]["role"] == "system":
        raise PromptError(
            "has a system message of its own, and there is --system; remove one"
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
            chat=bool(args.chat or args.format or args.system is not None),
            **settings,
        ),
        seed=args.seed,
        on_problem=dropped if args.on_bad == "drop" else None,
    )
    dropped.report()
    bar = PromptBar(len(pairs))
    facts = {
        name: vars(args)[name]
        for name in ("adapter", "quantize", "format", "system", "stop")
        if vars(args)[name]
    }
    facts = {"checkpoint": args.checkpoint or "bundled", **facts}
    facts |= {name: vars(args)[name] for name in ("max_new_tokens", "num_samples")}
    facts |= sampling_facts(settings["sampling"])
    try:
        complete_prompts(
            loaded, pairs, args.output, settings=facts, on_batch=bar.update
        )
    finally:
        bar.close(args.output)


def sampling_facts(sampling: Sampling) -> JsonObject:
    """Return temperature, top-p and seed, and other settings that have an effect."""
    ours = dataclasses.asdict(Sampling())
    always = ("temperature", "top_p", "seed")
    return {
        name: value
        for name, value in dataclasses.asdict(sampling).items()
        if name in always or value != ours[name]
    }
