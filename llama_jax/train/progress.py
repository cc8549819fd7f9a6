"""What people see of a run as it goes on, and how they end it."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.encode import TEXT_FORMATS
from llama_jax.generation.generate import generate
from llama_jax.generation.request import (
    Settings,
    chat_request,
    infilling_stop_ids,
    text_request,
)
from llama_jax.generation.sampling import Sampling
from llama_jax.train.metrics import Record
from llama_jax.train.stopping import Stop


class Bar:
    """A progress bar on standard error, or where that is no terminal, now and then a
    line.

    Args:
      first: steps that are done.
      steps: of the whole run.
      every: seconds between two lines.
    """

    def __init__(self, first: int, steps: int, *, every: float = 30.0) -> None:
        import tqdm

        self._first, self._steps, self._every = first, steps, every
        self._began = time.monotonic()
        self._told = -math.inf
        self._in_words = tqdm.tqdm.format_interval
        self._bar = tqdm.tqdm(
            initial=first,
            total=steps,
            unit="step",
            file=sys.stderr,
            disable=not _has_room(sys.stderr),
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def show(self, record: Record) -> None:
        """The latest numbers."""
        parts = [
            f"loss {record['loss']:.4f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.0%}")
        if memory := most_memory():
            parts.append(f"{memory / 1e9:.1f} GB")
        if self._bar.disable:
            self._tell(record["step"], parts)
        elif record["step"] != self._bar.n:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(record["step"] - self._bar.n)

    def _tell(self, step: int, parts: list[str]) -> None:
        now = time.monotonic()
        if now - self._told < self._every:
            return
        self._told = now
        if step > self._first + 1:  # the first one is compiled
            left = (now - self._began) / (step - self._first) * (self._steps - step)
            parts = [*parts, f"{self._in_words(left)} left"]
        self.say(f"step {step} of {self._steps}: {', '.join(parts)}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """The bar stays as it is."""
        self._bar.close()


def _has_room(channel: Any) -> bool:
    """Whether a bar is seen there: in a terminal that has a size, as not all have."""
    try:
        return bool(channel.isatty() and all(os.get_terminal_size(channel.fileno())))
    except (OSError, ValueError):  # `UnsupportedOperation` is both
        return False


def most_memory() -> int:
    """The most that any device here held at once (bytes); 0 where it is not told."""
    most = 0
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        most = max(most, (stats or {}).get("peak_bytes_in_use", 0))
    return most


@contextlib.contextmanager
def asked_by_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask a run to stop; a second one ends it as it would have."""
    before = {int(number): signal.getsignal(number) for number in _SIGNALS}

    def ask(number: int, _: Any) -> None:
        stop.ask()
        signal.signal(number, before[number])

    try:
        for number in _SIGNALS:
            signal.signal(number, ask)
        yield
    finally:
        for number in _SIGNALS:
            signal.signal(number, before[number])


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def samples(
    loaded: Loaded, prompts: Sequence[str], format: str, tokens: int
) -> list[str]:
    """Complete prompts greedily.

    Args:
      loaded: model, weights and tokenizer.
      prompts: texts, or user messages if the format is one of dialogs.
      format: format of the training data.
      tokens: most tokens of a completion.
    """
    tokenizer = loaded.tokenizer
    settings: Settings = {
        "sampling": Sampling(temperature=0),
        "max_new_tokens": tokens,
    }
    if format == "infilling":
        settings["stop_ids"] = infilling_stop_ids(tokenizer)
    if format in TEXT_FORMATS:
        requests = [text_request(tokenizer, text, **settings) for text in prompts]
    else:
        requests = [
            chat_request(
                tokenizer,
                [{"role": "user", "content": text}],
                format=format,
                **settings,
            )
            for text in prompts
        ]
    return [completion.text for completion in generate(loaded, requests)]
