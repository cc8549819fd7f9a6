"""`python -m llama_jax.conversion`: convert, verify and inspect checkpoints."""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

from llama_jax.checkpoint.lazy_leaf import Progress
from llama_jax.conversion import listing, verify
from llama_jax.conversion.convert import Converted, convert, plan_conversion
from llama_jax.conversion.formats import FormatName, open_source
from llama_jax.errors import LlamaJaxError

_FORMATS = get_args(FormatName)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{name}i": 1024**power for power, name in enumerate("KMGT", start=1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 with one sentence where it failed, 1 where models differ."""
    argv = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[argparse.Namespace, Progress], int]]
    commands = {"verify": _verify, "inspect": _inspect}
    name = argv[0] if argv and argv[0] in commands else "convert"
    args = _parser(name).parse_args(argv[name != "convert" :])
    command = commands.get(name, _convert)
    try:
        with _signals() as received, _progress_bar() as bar:

            def progress(what: str, done: int, total: int) -> None:
                if received:
                    raise _exit_of(received[0])
                if bar is not None:
                    bar(what, done, total)

            return command(args, progress)
    except (LlamaJaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT


def _convert(args: argparse.Namespace, progress: Progress) -> int:
    options = {
        "source_format": args.source_format,
        "target_format": args.target_format,
        "ranks": args.ranks,
        "tokenizer": args.tokenizer,
        "dtype": args.dtype,
        "max_seq_len": args.max_seq_len,
    }
    if args.dry_run:
        plan = plan_conversion(args.src, args.dst, **options)
        print("\n".join(listing.of_plan(plan, every=args.all)))
        return 0
    done = convert(
        args.src,
        args.dst,
        max_host_bytes=args.max_host_bytes,
        progress=progress,
        **options,
    )
    print(_summary(args.dst, done))
    if not args.verify:
        return 0
    a = open_source(args.src, form=args.source_format, max_seq_len=args.max_seq_len)
    b = open_source(
        args.dst, form=args.target_format, max_seq_len=done.config.max_seq_len
    )
    return _report(verify.compare(a, b, progress))


def _verify(args: argparse.Namespace, progress: Progress) -> int:
    a, b = (
        open_source(path, max_seq_len=args.max_seq_len) for path in (args.a, args.b)
    )
    return _report(verify.compare(a, b, progress))


def _inspect(args: argparse.Namespace, progress: Progress) -> int:
    source = open_source(args.folder, max_seq_len=args.max_seq_len)
    print("\n".join(listing.of_source(source, every=args.all)))
    return 0


def _report(found: verify.Comparison) -> int:
    print(verify.describe(found))
    return 0 if found.same else 1


def _parser(command: str) -> argparse.ArgumentParser:
    build = {"convert": _convert_parser, "verify": _verify_parser}
    parser = build.get(command, _inspect_parser)()
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="longest sequence in tokens; by default what the checkpoint says, or else "
        "the published model of the same sizes",
    )
    return parser


def _convert_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.conversion",
        description="Convert a Llama checkpoint from any of the formats to any other. "
        "Memory holds a few tensors, never the model.",
        epilog="Also: `python -m llama_jax.conversion verify A B` compares two "
        "checkpoints of any formats, and `... inspect FOLDER` says what one is.",
    )
    parser.add_argument(
        "src",
        metavar="SRC",
        help="a folder of Meta's, Hugging Face's or ours, a .gguf, or a llama2.c .bin",
    )
    parser.add_argument("dst", metavar="DST", help="the new folder or file")
    parser.add_argument(
        "--from",
        dest="source_format",
        choices=_FORMATS,
        help="format of SRC; by default it is recognised",
    )
    parser.add_argument(
        "--to",
        dest="target_format",
        choices=_FORMATS,
        help="format of DST; by default gguf or llama2c where DST ends in .gguf or "
        ".bin, else orbax, the format of this library",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="model-parallel files of a Meta folder (default: 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        help="of the weights; by default as in SRC (in a GGUF float16); q8_0 for GGUF",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model, tokenizer.json, or tokenizer.bin of llama2.c; by "
        "default SRC's own, or the one in its folder or the folder above",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the result with SRC, tensor by tensor and by its logits",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print which tensor becomes which, all sizes and the memory it takes, and "
        "write nothing",
    )
    parser.add_argument(
        "--all", action="store_true", help="with --dry-run: every layer, not the first"
    )
    parser.add_argument(
        "--max-host-bytes",
        type=_bytes,
        metavar="N",
        help="refuse what would take more host memory (2000000000, 2G or 2Gi); page "
        "cache is not counted",
    )
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.conversion verify",
        description="Compare two checkpoints: every weight bit for bit, then the "
        "logits on fixed prompts, layer by layer. Status 0 where the weights are equal "
        "(or equal after rounding to B's dtype), 1 where they differ.",
    )
    parser.add_argument("a", metavar="A", help="a checkpoint of any format")
    parser.add_argument("b", metavar="B", help="another one")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.conversion inspect",
        description="Say what a checkpoint is: configuration, tensors, dtypes, ranks, "
        "size.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="or file, of any format")
    parser.add_argument(
        "--all", action="store_true", help="every layer's tensors, not the first's only"
    )
    return parser


def _bytes(text: str) -> int:
    """A number of bytes, with or without a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?i?)B?", text)
    if not found or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of bytes; write 2000000000, 2G or 2Gi"
        )
    return int(float(found[1]) * _UNITS[found[2]])


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM as exceptions, which let the folder be removed.

    Yields what was received: a garbage collection callback (jax 0.7 has one) may
    swallow an exception, so whoever works for long asks again.
    """
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        received.append(number)
        raise _exit_of(number)

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_of(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextlib.contextmanager
def _progress_bar() -> Iterator[Progress | None]:
    """A bar with bytes, rate and time left on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            counted = {"unit": " layers"} if what == "running layers" else {
                "unit": "B", "unit_scale": True, "unit_divisor": 1024,
            }  # fmt: skip
            bars[what] = tqdm(total=total, desc=what, **counted)
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _summary(dst: str, done: Converted) -> str:
    config = done.config
    facts = ", ".join(f"{name} {value}" for name, value in config.to_dict().items())
    peak = ""
    if done.peak_bytes is not None:
        peak = f", at most {done.peak_bytes:,} bytes of host memory"
    return (
        f"{dst}: {done.parameters:,} parameters, {done.bytes:,} bytes in "
        f"{done.seconds:.1f} s{peak} ({facts}); max_seq_len {config.max_seq_len} "
        f"{done.context}; tokenizer {done.tokenizer}"
    )


if __name__ == "__main__":
    sys.exit(main())
