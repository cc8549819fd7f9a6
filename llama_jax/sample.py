"""`python -m llama_jax.sample`: complete a text, answer a message, fill a gap.

    python -m llama_jax.sample
    python -m llama_jax.sample --checkpoint DIR --prompt "The capital of France is"
    python -m llama_jax.sample --checkpoint DIR --chat
    python -m llama_jax.sample --checkpoint DIR --infill "def add(a, b):" "return c"
    python -m llama_jax.sample --checkpoint DIR --input prompts.jsonl --output out.jsonl

Text goes to standard output as it is generated, everything else to standard error.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import command as cli
from llama_jax.cli import prompt_files, sampling_flags
from llama_jax.cli.chat import Conversation
from llama_jax.cli.output import Clock, print_format_note, print_json, print_text
from llama_jax.cli.parser import (
    ArgumentParser,
    Rule,
    Rules,
    excludes,
    needs,
)
from llama_jax.cli.processes import add_process_arguments, start_processes
from llama_jax.errors import PromptError
from llama_jax.generation.generate import stream
from llama_jax.generation.request import (
    Request,
    Settings,
    chat_request,
    infill_request,
    text_request,
)
from llama_jax.text.prompt_formats import (
    Message,
    default_format,
    get_format,
)
from llama_jax.text.tokenizer import Tokenizer

STORY = "Once upon a time"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = parse(argv)
    several = start_processes(args)
    clock = Clock()
    args.seed = prompt_files.choose_seed(args.seed, args.output)
    given = sampling_flags.given_settings(args)
    if several and (args.prompt_file == "-" or not can_begin(args)):
        raise PromptError(
            "several processes have no common standard input; give --prompt or the "
            "name of a --prompt-file that all of them can read"
        )
    prompt = read_prompt(args)
    prompts = prompt_files.read(args.input, args.on_bad) if args.input else []
    if prompt is None and not prompt_files.is_dialog(args):
        prompt = STORY
    loaded = cli.load_model(args)
    clock.loaded()
    sampling = sampling_flags.make_sampling(loaded, given)
    settings: Settings = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": sampling,
        "num_samples": args.num_samples,
        "stop": args.stop,
        "logprobs": args.logprobs,
    }
    if args.input:
        prompt_files.complete(loaded, prompts, args, settings)
        return 0
    if prompt_files.is_dialog(args):
        print_format_note(loaded.tokenizer, args.format)
    if prompt is None and prompt_files.is_dialog(args):
        talk(loaded, args, settings)
        return 0
    request = make_request(loaded.tokenizer, args, prompt or "", settings)
    if prompt_files.is_dialog(args):
        check_chat_model(args)
    deltas = clock.watch(stream(loaded, [request]))
    before, after = args.infill or ("", "")
    if args.json:
        facts = {"prompt": before or prompt, "seed": sampling.seed}
        facts |= {"suffix": after} if args.infill else {}
        print_json(loaded, deltas, request, facts)
    else:
        print(before, end="", flush=True)
        print_text(loaded, deltas, after)
    clock.report(sampling.seed)
    return 0


def make_request(
    tokenizer: Tokenizer, args: argparse.Namespace, prompt: str, settings: Settings
) -> Request:
    """Make the request that the flags describe."""
    if args.infill:
        return infill_request(
            tokenizer, *args.infill, suffix_first=args.suffix_first, **settings
        )
    if prompt_files.is_dialog(args):
        messages = dialog(args.system, prompt)
        return chat_request(tokenizer, messages, format=args.format, **settings)
    # A text and its continuation are printed as one, with the space between them.
    settings["echo"] = not args.json
    return text_request(tokenizer, prompt, **settings)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and check what needs no model."""
    parser = ArgumentParser(
        prog="python -m llama_jax.sample",
        description="Complete a text, answer a message or fill a gap with a Llama. "
        "Text goes to standard output as it is generated, times and errors to standard "
        "error.",
        epilog="Without any flag, the small model that comes with the package writes a "
        "story. Ctrl-C stops. A flag without effect is refused.",
        rules=RULES,
    )
    group = parser.add_argument_group("model")
    cli.add_checkpoint_argument(group)
    cli.add_model_arguments(group)
    group = parser.add_argument_group("prompt")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--prompt", metavar="TEXT", help="text to continue, or a message")
    kind.add_argument(
        "--prompt-file",
        metavar="F",
        help="the same from a file (- is standard input), without its last newline",
    )
    kind.add_argument(
        "--infill",
        nargs=2,
        metavar=("PREFIX", "SUFFIX"),
        help="fill the gap between two texts (Code Llama 7B, 13B)",
    )
    prompt_files.add_input_argument(kind)
    prompt_files.add_on_bad_argument(group)
    group.add_argument(
        "--suffix-first",
        action="store_true",
        help="show the model the suffix before the prefix",
    )
    group.add_argument(
        "--chat",
        action="store_true",
        help="answer the prompt as a message; without a prompt, hold a conversation",
    )
    group.add_argument(
        "--system", metavar="TEXT", help="system message; implies --chat"
    )
    group.add_argument(
        "--format",
        metavar="NAME",
        help=prompt_files.CHAT_FORMAT_HELP,
    )
    sampling_flags.add_length_arguments(group)
    sampling_flags.add_sampling_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="report the log-probability of each token and of the N likeliest ones",
    )
    group.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per completion: prompt, completion, token_ids, "
        "finish_reason, prompt_tokens, completion_tokens, seed, and logprobs if given",
    )
    group.add_argument(
        "--output",
        metavar="FILE.jsonl",
        help="file of the completions, a JSON object on each line; the same command "
        "continues a file that is not complete",
    )
    cli.add_storage_arguments(parser)
    add_process_arguments(parser)
    return parser.parse_args(argv)


def can_begin(args: argparse.Namespace) -> bool:
    """Whether the prompt is known without reading standard input for messages."""
    return (
        bool(args.input)
        or not prompt_files.is_dialog(args)
        or read_prompt(args, check=True) is not None
    )


_PROMPT = Rule(can_begin, "in a chat without --prompt or --prompt-file")
RULES: Rules = {
    **sampling_flags.RULES,
    "--chat": excludes("--infill"),
    "--format": excludes("--infill"),
    "--input": needs("--output"),
    "--json": (_PROMPT, excludes("--input")),
    "--logprobs": (_PROMPT, excludes("--input")),
    "--num-samples": _PROMPT,
    "--on-bad": needs("--input"),
    "--output": needs("--input"),
    "--suffix-first": needs("--infill"),
    "--system": excludes("--infill"),
}
"""When flags have an effect."""


def read_prompt(args: argparse.Namespace, *, check: bool = False) -> str | None:
    """Read the text of the prompt; None if there is none.

    Args:
      args: the parsed flags.
      check: return "" for a file instead of reading it.
    """
    if args.prompt_file is None:
        prompt: str | None = args.prompt
        return prompt
    if check:
        return ""
    try:
        if args.prompt_file == "-":
            text = sys.stdin.read().removeprefix("\ufeff")
        else:
            text = pathlib.Path(args.prompt_file).read_text(encoding="utf-8-sig")
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
    """Make a dialog of one message."""
    turns: list[Message] = [{"role": "user", "content": message}]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def check_chat_model(args: argparse.Namespace) -> None:
    """Say so if the model is the bundled one, which cannot chat."""
    if args.checkpoint is None:
        print(
            "the bundled story model is no chat model; for answers give one with "
            "--checkpoint",
            file=sys.stderr,
        )


def talk(loaded: Loaded, args: argparse.Namespace, settings: Settings) -> None:
    """Hold a conversation."""
    tokenizer = loaded.tokenizer
    style = (
        get_format(args.format, tokenizer) if args.format else default_format(tokenizer)
    )
    settings["num_samples"] = 1
    check_chat_model(args)
    print(f"seed {args.seed}, format {style.name}", file=sys.stderr)
    Conversation(
        lambda dialog: chat_request(tokenizer, dialog, format=style, **settings),
        lambda request: stream(loaded, [request]),
        loaded.model.config.max_seq_len,
        args.system,
    ).loop()


if __name__ == "__main__":
    cli.run(main)
