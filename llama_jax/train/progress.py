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
from llama_jax.generation.completion import infilling_stop_ids
from llama_jax.generation.generate import generate
from llama_jax.generation.sampling import Sampling
from llama_jax.text.prompt_formats import completion_prompt, get_format
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
    """What the model writes behind each prompt, its likeliest tokens.

    Args:
      loaded: the model.
      prompts: texts, or messages where the format is of dialogs.
      format: of the training data.
      tokens: most that are written.
    """
    tokenizer = loaded.tokenizer
    options: dict[str, Any] = {"stop_ids": (tokenizer.eos_id, tokenizer.bos_id)}
    if format in TEXT_FORMATS:
        ids = [completion_prompt(tokenizer, prompt) for prompt in prompts]
        if format == "infilling":
            options["stop_ids"] = infilling_stop_ids(tokenizer)
    else:
        style = get_format(format)
        ids = [
            style.encode(tokenizer, [{"role": "user", "content": prompt}])
            for prompt in prompts
        ]
        options["stop_ids"] = style.stop_ids(tokenizer)
        options["stop"] = style.stop_strings
    # What is asked for has to fit behind the longest prompt.
    room = loaded.model.config.max_seq_len - max(map(len, ids))
    found = generate(
        loaded,
        ids,
        sampling=Sampling(temperature=0),
        max_new_tokens=max(min(tokens, room), 1),
        **options,
    )
    return [completion.text for completion in found]
