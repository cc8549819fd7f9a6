"""Progress of a training run on standard error, and its end by signals."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from llama_jax.data.loader import Loader
from llama_jax.train.metrics import Record
from llama_jax.train.report import peak_memory_bytes
from llama_jax.train.reporter import RunStart, Sample
from llama_jax.train.stopping import Stop


class ProgressBar:
    """A progress bar in a terminal; elsewhere a line at intervals. On standard error.

    Args:
      first_step: steps done before.
      total_steps: of the whole run.
      seconds: between two lines.
    """

    def __init__(
        self, first_step: int, total_steps: int, *, seconds: float = 30.0
    ) -> None:
        import tqdm

        self._first, self._total, self._interval = first_step, total_steps, seconds
        self._start = time.monotonic()
        self._last_line = -math.inf
        self._format_interval = tqdm.tqdm.format_interval
        self._bar = tqdm.tqdm(
            initial=first_step,
            total=total_steps,
            unit="step",
            file=sys.stderr,
            disable=not _is_terminal(sys.stderr),
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def update(self, record: Record) -> None:
        """Show the numbers of a step."""
        parts = [
            f"loss {record['loss']:.4f}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
        ]
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.0%}")
        if memory := peak_memory_bytes():
            parts.append(f"{memory / 1e9:.1f} GB")
        if self._bar.disable:
            self._print_line(record["step"], parts)
        elif record["step"] != self._bar.n:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(record["step"] - self._bar.n)

    def _print_line(self, step: int, parts: list[str]) -> None:
        now = time.monotonic()
        if now - self._last_line < self._interval:
            return
        self._last_line = now
        if step > self._first + 1:  # the first step includes compilation
            left = (now - self._start) / (step - self._first) * (self._total - step)
            parts = [*parts, f"{self._format_interval(left)} left"]
        self.print(f"step {step} of {self._total}: {', '.join(parts)}")

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.write(text, file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


class PromptBar:
    """A bar of finished prompts in a terminal; nothing elsewhere. On standard error.

    Args:
      total: prompts.
    """

    def __init__(self, total: int) -> None:
        self._total, self._tokens = total, 0
        self._start = time.monotonic()
        self._bar: Any = None

    def update(self, done: int, tokens: int) -> None:
        """Show how many prompts are finished; `tokens` are those since the last call.

        The first call says how many were finished before.
        """
        import tqdm

        self._done = done
        if self._bar is None:
            self._first, self._start = done, time.monotonic()
            self._bar = tqdm.tqdm(
                initial=done,
                total=self._total,
                unit="prompt",
                file=sys.stderr,
                disable=not _is_terminal(sys.stderr),
                dynamic_ncols=True,
            )
            return
        self._tokens += tokens
        self._bar.set_postfix_str(f"{self._rate():,.0f} tokens/s", refresh=False)
        self._bar.update(done - self._bar.n)

    def close(self, path: object, seed: int) -> None:
        """Leave the bar as it is, and print a summary with the seed of the run."""
        if self._bar is None:
            return
        self._bar.close()
        before = f" ({self._first:,} of them before)" if self._first else ""
        of_all = f" of {self._total:,}" if self._done < self._total else ""
        print(
            f"{self._done:,}{of_all} prompts{before} in {path}: "
            f"{self._tokens:,} new tokens, {self._rate():,.0f} tokens/s, seed {seed}",
            file=sys.stderr,
        )

    def _rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._start, 1e-9)


def _is_terminal(channel: Any) -> bool:
    """Whether it is a terminal with a size; some have none, and show no bar."""
    try:
        return bool(channel.isatty() and all(os.get_terminal_size(channel.fileno())))
    except (OSError, ValueError):  # `UnsupportedOperation` is both
        return False


class TerminalReporter:
    """Reports a run of `finetune` on standard error.

    Args:
      held_out: loader of the held-out data, for its counts.
    """

    def __init__(self, held_out: Loader | None = None) -> None:
        self._held_out = held_out

    def start(self, facts: RunStart) -> None:
        """Print the run's size, and show the bar."""
        what = "adapter weights" if facts.trains_adapters else "weights"
        first = facts.first_step
        resumed = f", resumed after step {first}" if first else ""
        text = (
            f"training {facts.num_trained:,} {what} for {facts.total_steps:,} "
            f"steps{resumed}"
        )
        print(text, file=sys.stderr, flush=True)
        self._bar = ProgressBar(first, facts.total_steps)

    def initial_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Print the held-out loss before training."""
        counts = ""
        if self._held_out is not None:
            read = self._held_out.statistics
            counts = f" of {read.records:,} records; {read.left_out}"
        self._bar.print(
            f"before the first step: held-out loss {metrics['eval_loss']:.4f} over "
            f"{metrics['eval_targets']:,.0f} targets{counts}"
        )

    def step(self, record: Record) -> None:
        """Advance the bar; print an evaluation, or that the step was skipped."""
        self._bar.update(record)
        step = record["step"]
        if record["skipped"]:
            of_process = "-of-process-*" if jax.process_count() > 1 else ""
            self._bar.print(
                f"step {step}: skipped, as loss or gradient is not finite; its batch "
                f"is in skipped-{step:06d}{of_process}.npz"
            )
        if "eval_loss" in record:
            self._bar.print(
                f"step {step}: loss {record['loss']:.4f}, held-out loss "
                f"{record['eval_loss']:.4f}"
            )

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Print prompts and completions."""
        for sample in samples:
            self._bar.print(f"step {step}: {sample['prompt']} ⟶ {sample['text']}")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C request a stop; a second one acts as it did before."""
    before = {int(number): signal.getsignal(number) for number in _SIGNALS}

    def handle(number: int, _: object) -> None:
        stop.request()
        signal.signal(number, before[number])

    try:
        for number in _SIGNALS:
            signal.signal(number, handle)
        yield
    finally:
        for number in _SIGNALS:
            signal.signal(number, before[number])
