"""`python -m llama_jax.conversion SRC DST`: a foreign checkpoint to ours."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from llama_jax.conversion.convert import Converted, convert
from llama_jax.errors import LlamaJaxError
from llama_jax.leaves import Progress
from llama_jax.runtime import DType


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and return the exit status: 2 with one sentence where that failed."""
    args = _parser().parse_args(argv)
    try:
        with _signals() as received, _progress_bar() as bar:

            def progress(what: str, done: int, total: int) -> None:
                if received:
                    raise _exit_of(received[0])
                if bar is not None:
                    bar(what, done, total)

            done = convert(
                args.src,
                args.dst,
                tokenizer=args.tokenizer,
                dtype=args.dtype,
                max_seq_len=args.max_seq_len,
                progress=progress,
            )
    except (LlamaJaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    print(_summary(args.dst, done))
    return 0


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.conversion",
        description="Convert a Llama checkpoint to the format of llama_jax (Orbax).",
    )
    parser.add_argument(
        "src", metavar="SRC", help="a folder of Meta's, or a llama2.c .bin file"
    )
    parser.add_argument("dst", metavar="DST", help="the new folder")
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.model, or tokenizer.bin of llama2.c; by default the one in "
        "SRC's folder or the folder above",
    )
    parser.add_argument(
        "--dtype", choices=get_args(DType), help="of the weights; by default as in SRC"
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="longest sequence in tokens; by default what SRC says, or else the "
        "published model of the same sizes",
    )
    return parser


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
            bars[what] = tqdm(
                total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024
            )
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def _summary(dst: str, done: Converted) -> str:
    config = done.config
    facts = ", ".join(f"{name} {value}" for name, value in config.to_dict().items())
    return (
        f"{dst}: {done.parameters:,} parameters, {done.bytes:,} bytes in "
        f"{done.seconds:.1f} s ({facts}); max_seq_len {config.max_seq_len} "
        f"{done.context}; tokenizer {done.tokenizer}"
    )


if __name__ == "__main__":
    sys.exit(main())
