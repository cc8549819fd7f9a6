"""`python -m llama_jax.conversion`: convert, verify and inspect checkpoints."""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from llama_jax.checkpoint.lazy_leaf import Progress
from llama_jax.cli import command as cli
from llama_jax.cli.parser import ArgumentParser, Rule, Rules, excludes, needs
from llama_jax.conversion.comparison import Comparison, compare
from llama_jax.conversion.converter import convert, prepare_conversion
from llama_jax.conversion.formats import open_source
from llama_jax.conversion.report import (
    describe_comparison,
    describe_conversion,
    describe_result,
    describe_source,
)
from llama_jax.conversion.tensor_tables import FormatName
from llama_jax.conversion.tokenizer_files import open_tokenizer
from llama_jax.errors import LlamaJaxError

_FORMATS = get_args(FormatName)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}i": 1024**power for power, name in enumerate("KMGT", start=1)}
_PROGRAM = "python -m llama_jax.conversion"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 (models differ) or 2 (error)."""
    argv = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[argparse.Namespace, Progress], int]]
    commands = {"verify": _verify, "inspect": _inspect}
    name = argv[0] if argv and argv[0] in commands else "convert"
    options = _parser(name).parse_args(argv[name != "convert" :])
    command = commands.get(name, _convert)
    try:
        with _record_signals() as received, _progress_bar() as bar:

            def progress(stage: str, done: int, total: int) -> None:
                if received:
                    raise _exception_of(received[0])
                if bar is not None:
                    bar(stage, done, total)

            return command(options, progress)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
        raise
    except (LlamaJaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT


def _convert(options: argparse.Namespace, progress: Progress) -> int:
    settings = {
        "source_format": options.source_format,
        "target_format": options.target_format,
        "ranks": options.ranks,
        "tokenizer": options.tokenizer,
        "dtype": options.dtype,
        "max_seq_len": options.max_seq_len,
        "max_host_bytes": options.max_host_bytes,
    }
    src, dst = options.src, options.dst
    if options.dry_run:
        prepared = prepare_conversion(src, dst, **settings)
        _print(describe_conversion(prepared, dst, all_layers=options.all))
        return 0
    result = convert(src, dst, progress=progress, **settings)
    _print(describe_result(result, dst))
    if not options.verify:
        return 0
    a = open_source(src, format=options.source_format, max_seq_len=options.max_seq_len)
    if options.tokenizer is not None:
        a = a.with_tokenizer(open_tokenizer(options.tokenizer), options.tokenizer)
    b = open_source(
        dst, format=options.target_format, max_seq_len=result.config.max_seq_len
    )
    return _print_comparison(compare(a, b, progress))


def _verify(options: argparse.Namespace, progress: Progress) -> int:
    a, b = (
        open_source(path, max_seq_len=options.max_seq_len)
        for path in (options.a, options.b)
    )
    return _print_comparison(compare(a, b, progress))


def _inspect(options: argparse.Namespace, progress: Progress) -> int:
    source = open_source(options.path, max_seq_len=options.max_seq_len)
    _print(describe_source(source, all_layers=options.all))
    return 0


def _print(lines: Iterator[str]) -> None:
    print("\n".join(lines))


def _print_comparison(comparison: Comparison) -> int:
    _print(describe_comparison(comparison))
    return 0 if comparison.same else 1


def _parser(command: str) -> ArgumentParser:
    build = {"convert": _convert_parser, "verify": _verify_parser}
    parser = build.get(command, _inspect_parser)()
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="maximum sequence length in tokens; default: the checkpoint's own, or for "
        "a Meta folder that of the published model of the same sizes",
    )
    return parser


RULES: Rules = {
    "--all": needs("--dry-run"),
    "--ranks": Rule(
        lambda args: args.target_format == "meta", "without --to meta", "with --to meta"
    ),
    "--verify": excludes("--dry-run"),
}
"""When flags of a conversion have an effect."""


def _convert_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=_PROGRAM,
        usage=f"""
  {_PROGRAM} [options] SRC DST     convert a checkpoint
  {_PROGRAM} verify A B            compare two checkpoints
  {_PROGRAM} inspect CHECKPOINT    describe a checkpoint""",
        description="""\
Convert a Llama checkpoint between formats, one tensor at a time. PyTorch is not
needed, and host memory holds a few tensors, never the whole model. DST appears
complete or not at all.

formats:
  orbax    folder of this library
  hf       Hugging Face folder: config.json, *.safetensors (or, to read only,
           pytorch_model*.bin)
  meta     Meta folder: params.json, consolidated.NN.pth
  gguf     GGUF file of llama.cpp
  llama2c  .bin file of llama2.c, version 0, float32""",
        epilog=f"""\
exit status:
  0 success; 1 --verify found different weights or tokenizers; 2 error

examples:
  {_PROGRAM} llama-2-7b-chat checkpoints/llama-2-7b-chat
  {_PROGRAM} my-model hf --to hf --dtype bfloat16 --verify
  {_PROGRAM} my-model model.gguf --dtype q8_0
  {_PROGRAM} my-model meta --to meta --ranks 2 --dry-run""",
        rules=RULES,
    )
    parser.add_argument(
        "src", metavar="SRC", help="folder or file, of any of the formats"
    )
    parser.add_argument("dst", metavar="DST", help="new folder or file")
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=_FORMATS,
        help="format of SRC; default: recognized by its files",
    )
    parser.add_argument(
        "--to",
        dest="target_format",
        choices=_FORMATS,
        help="format of DST; default: gguf or llama2c if DST ends in .gguf or .bin, "
        "else orbax",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        help="dtype of the weights; default: that of SRC, for GGUF float16; q8_0 is "
        "for GGUF only, llama2.c has only float32",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model, tokenizer.json, or tokenizer.bin of llama2.c; default: "
        "that of SRC, or the one in the folder above",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="number of model-parallel files of a Meta folder (default: 1)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare DST with SRC afterwards: weights, logits, tokenizers",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print which tensor becomes which, sizes, and the memory needed; write "
        "nothing",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="print all layers, not only the first",
    )
    parser.add_argument(
        "--max-host-bytes",
        type=_parse_bytes,
        metavar="N",
        help="refuse a conversion that may need more host memory, the page cache not "
        "counted: 2000000000, 2G or 2Gi",
    )
    return parser


def _verify_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{_PROGRAM} verify",
        description="Compare two checkpoints of any formats: every weight bit for bit, "
        "then the logits of both models on fixed prompts, layer by layer, and what "
        "both say about text.",
        epilog="Exit status: 0 if tokenizers are equal, and all weights are, or are "
        "after rounding to the dtype of B; 1 if they differ; 2 on errors.",
    )
    parser.add_argument("a", metavar="A", help="folder or file, the reference")
    parser.add_argument("b", metavar="B", help="folder or file, the other one")
    return parser


def _inspect_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"{_PROGRAM} inspect",
        description="Print format, configuration, number of parameters, dtypes and "
        "tensors of a checkpoint. Reads no weights.",
    )
    parser.add_argument(
        "path", metavar="CHECKPOINT", help="folder or file, of any format"
    )
    parser.add_argument(
        "--all", action="store_true", help="list all layers, not only the first"
    )
    return parser


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?)B?", text)
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes; write 2000000000, 2G or 2Gi"
        )
    return int(float(match[1]) * _UNITS[match[2]])


@contextlib.contextmanager
def _record_signals() -> Iterator[list[int]]:
    """Yield the list of SIGINT and SIGTERM received so far.

    Reports of progress raise them, so that unfinished output is removed. An exception
    anywhere else may be lost in a callback of JAX's, or leave tasks of Orbax's. Only a
    second signal raises wherever the program is.
    """
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise _exception_of(number)

    previous = {
        number: signal.signal(number, handle)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exception_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """Show bytes, rate and remaining time if stderr is a terminal; else yield None."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            unit = {"unit": " layers"} if stage == "running layers" else {
                "unit": "B", "unit_scale": True, "unit_divisor": 1024,
            }  # fmt: skip
            bars[stage] = tqdm(total=total, desc=stage, **unit)
        bars[stage].update(done - bars[stage].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


if __name__ == "__main__":
    cli.run(main)
