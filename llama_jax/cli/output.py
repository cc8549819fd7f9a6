"""Output of `sample`: text as it is generated, JSON lines, times."""

import json
import sys
import time
from collections.abc import Iterator

import jax

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation.generate import Delta
from llama_jax.generation.request import Request
from llama_jax.text.chat_template import DEFAULT, TEMPLATE
from llama_jax.text.prompt_formats import FORMATS, default_format
from llama_jax.text.tokenizer import Tokenizer


def print_format_note(tokenizer: Tokenizer, format: str | None) -> None:
    """Say that a format of ours is used instead of the checkpoint's chat template.

    Args:
      tokenizer: of the checkpoint.
      format: what is used for dialogs; None is the default.
    """
    templates = tokenizer.settings.chat_templates
    if format is None and DEFAULT not in templates:
        format = default_format(tokenizer).name
    if templates and format in FORMATS:
        name = TEMPLATE if DEFAULT in templates else f"{TEMPLATE}:{min(templates)}"
        print(
            f"format {format}, not the checkpoint's chat template (--format {name})",
            file=sys.stderr,
        )


def print_text(loaded: Loaded, deltas: Iterator[Delta], suffix: str) -> None:
    """Print the first completion as it is generated, then the others in order.

    A table of log-probabilities follows the text.

    Args:
      loaded: its tokenizer names tokens.
      deltas: of all completions.
      suffix: printed after each completion.
    """
    others: dict[int, list[str]] = {}
    scored: list[Delta] = []
    for delta in deltas:
        if delta.completion == 0:
            print(delta.text, end="", flush=True)
        else:
            others.setdefault(delta.completion, []).append(delta.text)
        if delta.logprobs is not None:
            scored.append(delta)
        if delta.finish_reason and delta.completion == 0:
            print(suffix)
    for index in sorted(others):
        print(f"\n--- {index + 1} ---\n{''.join(others[index])}{suffix}")
    sys.stdout.flush()
    for delta in sorted(scored, key=lambda delta: delta.completion):
        print_logprobs(loaded, delta)


def print_logprobs(loaded: Loaded, delta: Delta) -> None:
    """Print a line per token: its log-probability, and the likeliest alternatives."""
    text = loaded.tokenizer.token_text
    scores = zip(
        delta.token_ids, delta.logprobs or (), delta.top_logprobs or (), strict=True
    )
    for token, logprob, top in scores:
        others = "  ".join(f"{text(id)!r} {value:.4f}" for id, value in top)
        line = f"[{delta.completion}] {text(token)!r} {logprob:.4f}"
        print(f"{line}   | {others}" if others else line, file=sys.stderr)


def print_json(
    loaded: Loaded, deltas: Iterator[Delta], request: Request, facts: dict[str, object]
) -> None:
    """Print a JSON object per completion, in the order in which they end.

    Args:
      loaded: its tokenizer names tokens.
      deltas: of all completions.
      request: what they complete.
      facts: first fields of each object.
    """
    parts: list[list[Delta]] = [[] for _ in range(request.num_samples)]
    for delta in deltas:
        own = parts[delta.completion]
        own.append(delta)
        if delta.finish_reason is None:
            continue
        tokens = [token for part in own for token in part.token_ids]
        line = facts | {
            "index": delta.completion,
            "completion": "".join(part.text for part in own),
            "token_ids": tokens,
            "finish_reason": delta.finish_reason,
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": len(tokens),
        }
        if delta.logprobs is not None:
            line["logprobs"] = [lp for part in own for lp in part.logprobs or ()]
            line["top_logprobs"] = [
                [
                    {"id": id, "token": loaded.tokenizer.token_text(id), "logprob": lp}
                    for id, lp in top
                ]
                for part in own
                for top in part.top_logprobs or ()
            ]
        print(json.dumps(line, ensure_ascii=False), flush=True)


class Clock:
    """Seconds of loading, compiling and generating, and tokens per second."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._load = self._compile = 0.0
        # Seconds since loading, and of them for compiling, at the first and last delta.
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)
        self._tokens = 0
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, event: str, duration_secs: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            self._compile += duration_secs

    def loaded(self) -> None:
        """Note that the model is in memory: the request starts now."""
        now = time.perf_counter()
        self._load, self._start = now - self._start, now

    def watch(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """Time deltas on their way."""
        for delta in deltas:
            self._last = (time.perf_counter() - self._start, self._compile)
            if self._first is None:
                self._first = self._last
            else:
                self._tokens += len(delta.token_ids)
            yield delta

    def report(self, seed: int) -> None:
        """Print one line on standard error."""
        (first, compiled), (last, compiled_last) = self._first or self._last, self._last
        seconds = last - first - (compiled_last - compiled)
        rate = f"{self._tokens / seconds:.1f}" if seconds > 0 else "-"
        print(
            f"[seed {seed}; load {self._load:.2f} s, compile {self._compile:.2f} s, "
            f"first token {first:.2f} s, then {rate} tokens/s]",
            file=sys.stderr,
        )
