"""What `sample` shows: text as it is made, JSON lines, times."""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.generation.generate import Delta
from llama_jax.generation.request import Request


def print_text(loaded: Loaded, deltas: Iterator[Delta], suffix: str) -> None:
    """The first completion as it is made, the others whole, one after another."""
    waiting: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.completion == 0:
            print(delta.text, end="", flush=True)
        else:
            waiting.setdefault(delta.completion, []).append(delta.text)
        if delta.logprobs is not None:
            print_logprobs(loaded, delta)
        if delta.finish_reason and delta.completion == 0:
            print(suffix)
    for index in sorted(waiting):
        print(f"\n--- {index + 1} ---\n{''.join(waiting[index])}{suffix}")


def print_logprobs(loaded: Loaded, delta: Delta) -> None:
    """A line for each token: its log-probability, and the likeliest in its place."""
    text = loaded.tokenizer.token_text
    for place, token in enumerate(delta.token_ids):
        logprob = (delta.logprobs or ())[place]
        top = (delta.top_logprobs or ())[place]
        others = "  ".join(f"{text(id)!r} {value:.4f}" for id, value in top)
        line = f"[{delta.completion}] {text(token)!r} {logprob:.4f}"
        print(f"{line}   | {others}" if others else line, file=sys.stderr)


def print_json(
    loaded: Loaded, deltas: Iterator[Delta], request: Request, facts: dict[str, Any]
) -> None:
    """A line for each completion, in the order in which they end."""
    parts: list[list[Delta]] = [[] for _ in range(request.num_samples)]
    for delta in deltas:
        mine = parts[delta.completion]
        mine.append(delta)
        if delta.finish_reason is None:
            continue
        tokens = [token for part in mine for token in part.token_ids]
        line = facts | {
            "index": delta.completion,
            "completion": "".join(part.text for part in mine),
            "token_ids": tokens,
            "finish_reason": delta.finish_reason,
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": len(tokens),
        }
        if delta.logprobs is not None:
            line["logprobs"] = [lp for part in mine for lp in part.logprobs or ()]
            line["top_logprobs"] = [
                [
                    {"id": id, "token": loaded.tokenizer.token_text(id), "logprob": lp}
                    for id, lp in top
                ]
                for part in mine
                for top in part.top_logprobs or ()
            ]
        print(json.dumps(line, ensure_ascii=False), flush=True)


class Clock:
    """Seconds of loading, compiling and writing, and the rate of the last."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._load = self._first = self._end = self._compile = 0.0
        self._compile_after_first = 0.0
        self._tokens = self._after_first = 0
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self._compile += duration_secs
            if self._first:
                self._compile_after_first += duration_secs

    def loaded(self) -> None:
        """The model is in memory; from here on it is the request that takes time."""
        self._load, self._began = time.perf_counter() - self._began, time.perf_counter()

    def watch(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        """The same deltas, with the clock on them."""
        for delta in deltas:
            now = time.perf_counter() - self._began
            if not self._first:
                self._first = now
            else:
                self._after_first += len(delta.token_ids)
            self._end = now
            yield delta

    def report(self, seed: int) -> None:
        """One line on standard error."""
        seconds = self._end - self._first - self._compile_after_first
        rate = f"{self._after_first / seconds:.1f}" if seconds > 0 else "-"
        print(
            f"[seed {seed}; load {self._load:.2f} s, compile {self._compile:.2f} s, "
            f"first token {self._first:.2f} s, then {rate} tokens/s]",
            file=sys.stderr,
        )
