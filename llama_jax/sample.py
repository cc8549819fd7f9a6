"""`python -m llama_jax.sample`: a model writes, answers or fills a gap.

    python -m llama_jax.sample
    python -m llama_jax.sample --checkpoint DIR --prompt "The capital of France is"
    python -m llama_jax.sample --checkpoint DIR --chat
    python -m llama_jax.sample --checkpoint DIR --infill "def add(a, b):" "return c"

Text goes to standard output as it is made, everything else to standard error.
"""

import argparse
import pathlib
import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli.chat import Conversation
from llama_jax.cli.output import Clock, print_json, print_text
from llama_jax.cli.processes import add_process_arguments, start_processes
from llama_jax.distributed import broadcast_from_main
from llama_jax.errors import PromptError
from llama_jax.generation.generate import stream
from llama_jax.generation.request import (
    Settings,
    chat_request,
    infill_request,
    text_request,
)
from llama_jax.generation.sampling import Sampling
from llama_jax.text.prompt_formats import (
    FORMATS,
    Dialog,
    Message,
    PromptFormat,
    default_format,
    get_format,
)

STORY = "Once upon a time"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    args = parse(argv)
    several = start_processes(args)
    clock = Clock()
    sampling = Sampling(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=broadcast_from_main(secrets.randbits(32))
        if args.seed is None
        else args.seed,
    )
    if several and (args.prompt_file == "-" or not can_begin(args)):
        raise PromptError(
            "several processes have no common standard input; give --prompt or the "
            "name of a --prompt-file that all of them can read"
        )
    prompt = read_prompt(args)
    loaded = cli.load_model(args)
    clock.loaded()
    settings: Settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "num_samples": args.num_samples,
        "stop": args.stop,
        "logprobs": args.logprobs,
    }
    facts: dict[str, Any] = {"prompt": prompt, "seed": sampling.seed}
    before, after = "", ""
    if args.infill:
        before, after = args.infill
        request = infill_request(
            loaded.tokenizer,
            before,
            after,
            suffix_first=args.suffix_first,
            **settings,
        )
        facts |= {"prompt": before, "suffix": after}
    elif is_dialog(args):
        style = get_format(args.format) if args.format else None
        style = style or default_format(loaded.tokenizer)
        if prompt is None:
            talk(loaded, style, args.system, settings)
            return 0
        messages = dialog(args.system, prompt)
        request = chat_request(loaded.tokenizer, messages, format=style, **settings)
    else:
        facts["prompt"] = STORY if prompt is None else prompt
        # A text and its continuation are printed as one, with the space between them.
        settings["echo"] = not args.json
        request = text_request(loaded.tokenizer, facts["prompt"], **settings)
    deltas = clock.watch(stream(loaded, [request]))
    if args.json:
        print_json(loaded, deltas, request, facts)
    else:
        print(before, end="", flush=True)
        print_text(loaded, deltas, after)
    clock.report(sampling.seed)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked as far as that needs no model."""
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.sample",
        description="Let a Llama write, answer or fill a gap. Text goes to standard "
        "output as it is made; times and errors go to standard error.",
        epilog="Without any flag, the small model that comes with the package tells a "
        "story. Ctrl-C stops.",
    )
    cli.add_model_arguments(parser)
    cli.add_storage_arguments(parser)
    add_process_arguments(parser)
    group = parser.add_argument_group("what to write")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--prompt", metavar="TEXT", help="text to continue, or a message")
    kind.add_argument(
        "--prompt-file",
        metavar="F",
        help="the same from a file (- is standard input); its last line end is dropped",
    )
    kind.add_argument(
        "--infill",
        nargs=2,
        metavar=("PREFIX", "SUFFIX"),
        help="write what belongs between the two (Code Llama 7B, 13B)",
    )
    group.add_argument(
        "--suffix-first",
        action="store_true",
        help="with --infill: show the model the suffix before the prefix",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="the prompt is a message to answer; without one, talk (/help says how)",
    )
    group.add_argument(
        "--system", metavar="TEXT", help="system message; implies --chat"
    )
    group.add_argument(
        "--format",
        metavar="NAME",
        help="prompt format; implies --chat: "
        f"{', '.join(FORMATS)} (default: that of Meta's chat models)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=cli.positive_int,
        default=512,
        metavar="N",
        help="length limit of a completion (default: 512)",
    )
    group.add_argument(
        "--num-samples",
        type=cli.positive_int,
        default=1,
        metavar="N",
        help="completions of the prompt (default: 1)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STR",
        help="end a completion before this text; can be repeated",
    )
    group = parser.add_argument_group("sampling")
    for flag, kind_of, default, text in (
        ("--temperature", float, 0.6, "0 always takes the likeliest token"),
        ("--top-p", float, 0.9, "keep the likeliest tokens that hold this much mass"),
        ("--top-k", int, 0, "keep this many of the likeliest tokens; 0 keeps all"),
        ("--min-p", float, 0.0, "keep tokens this likely, relative to the likeliest"),
        ("--repetition-penalty", float, 1.0, "above 1 avoids tokens seen before"),
        ("--presence-penalty", float, 0.0, "above 0 avoids tokens written before"),
        ("--frequency-penalty", float, 0.0, "the same, for each time they were"),
    ):
        group.add_argument(
            flag, type=kind_of, default=default, help=f"{text} (default: {default})"
        )
    group.add_argument(
        "--seed", type=int, help="of the random numbers (default: random, and printed)"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="also give each token's log-probability and the N likeliest in its place",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per completion and line: prompt, completion, token_ids, "
        "finish_reason, prompt_tokens, completion_tokens, seed, and logprobs if asked",
    )
    args = parser.parse_args(argv)
    if args.infill and is_dialog(args):
        parser.error("--infill takes neither --chat nor --system nor --format")
    if args.suffix_first and not args.infill:
        parser.error("--suffix-first belongs to --infill")
    if args.json and not can_begin(args):
        parser.error("--json with --chat needs --prompt or --prompt-file")
    return args


def is_dialog(args: argparse.Namespace) -> bool:
    """Whether the prompt is a message to answer, not a text to continue."""
    return bool(args.chat or args.format or args.system is not None)


def can_begin(args: argparse.Namespace) -> bool:
    """Whether there is something to write without asking for it."""
    return not is_dialog(args) or read_prompt(args, check=True) is not None


def read_prompt(args: argparse.Namespace, *, check: bool = False) -> str | None:
    """The prompt's text, None if there is none (`check`: do not read the file)."""
    if args.prompt_file is None:
        prompt: str | None = args.prompt
        return prompt
    if check:
        return ""
    try:
        if args.prompt_file == "-":
            text = sys.stdin.read()
        else:
            text = pathlib.Path(args.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(
            f"--prompt-file: cannot read {args.prompt_file}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise PromptError(
            f"--prompt-file: {args.prompt_file} is not UTF-8 text (byte {error.start})"
        ) from error
    return text.removesuffix("\n")


def dialog(system: str | None, message: str) -> list[Message]:
    """A dialog of one message."""
    turns: list[Message] = [{"role": "user", "content": message}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def talk(
    loaded: Loaded, style: PromptFormat, system: str | None, settings: Settings
) -> None:
    """Hold a conversation."""
    settings["num_samples"] = 1

    def answer(dialog: Dialog) -> Iterator[str]:
        request = chat_request(loaded.tokenizer, dialog, format=style, **settings)
        for delta in stream(loaded, [request]):
            yield delta.text

    seed = settings["sampling"].seed
    print(f"seed {seed}, format {style.name}", file=sys.stderr)
    Conversation(answer, system).loop()


if __name__ == "__main__":
    cli.run(main)
