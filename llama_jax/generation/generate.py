"""The host side of generation: requests in, completions out.

`stream` yields the new text after every few decoding steps; `generate` collects it.
With several processes, each gives the same requests and gets the same completions.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from llama_jax.arguments import checked
from llama_jax.checkpoint.finite import find_non_finite
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.config import LlamaConfig
from llama_jax.distributed import to_host
from llama_jax.errors import CheckpointError, ConfigError, PromptError
from llama_jax.generation.batching import (
    bucket,
    cut_batches,
    slots_needed,
    start_inputs,
    token_limit,
)
from llama_jax.generation.lanes import MAX_STEPS, Emitted, advance, release, start
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import TokenLogprobs
from llama_jax.generation.stop_strings import StopScanner
from llama_jax.text.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "unsafe"]
TopLogprobs = tuple[tuple[int, float], ...]


class Delta(NamedTuple):
    """New text and tokens of one completion.

    Attributes:
      completion: index of the completion; they are numbered request by request.
      text: text that follows that of earlier deltas.
      token_ids: tokens, likewise.
      logprobs: of each of `token_ids`; see `Completion`.
      top_logprobs: likewise.
      finish_reason: set in the last delta of a completion.
      stop_id: the token that ended it, if one of the request's stop ids did.
      stop_logprob: its log-probability, if the request has `logprobs`.
    """

    completion: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[TopLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_id: int | None = None
    stop_logprob: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished completion.

    Attributes:
      text: without what ended it; after the prompt's text if the request has `echo`.
      token_ids: likewise; a token that completed a stop string is the last of them.
      finish_reason: `"stop"` (stop id or string), `"length"` (the limit), or `"unsafe"`
        (a dialog with special tags, which was not run).
      prompt_ids: the prompt as the model read it.
      logprobs: log-probability of each of `token_ids` under the model's own
        distribution (no temperature), 0 for the first token of a prompt; None without
        `logprobs` in the request.
      top_logprobs: the likeliest (id, log-probability) pairs at each position.
      stop_id: the token that ended it, if one of the request's stop ids did.
      stop_logprob: its log-probability; None without `logprobs` in the request.
      full_text: for infilling: prefix, completion and suffix.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    stop_id: int | None = None
    stop_logprob: float | None = None
    full_text: str | None = None


@checked(PromptError)
def generate(
    loaded: Loaded,
    requests: Sequence[Request],
    *,
    chunk: int = MAX_STEPS,
    max_batch_bytes: int | None = None,
) -> list[Completion]:
    """Complete requests.

    Args:
      loaded: model, weights and tokenizer.
      requests: any number; they run in batches that fit memory.
      chunk: decoding steps between two searches for stop strings; changes nothing
        else.
      max_batch_bytes: most bytes of a batch on one device (caches and logits, without
        weights); defaults to three quarters of its free memory.

    Returns:
      `num_samples` completions per request, request by request.

    Raises:
      PromptError: a request that the model cannot run: a prompt that is too long, an
        id that it lacks; before anything is computed.
      CheckpointError: the logits are not finite; names the weight, if it is one.

    >>> import llama_jax
    >>> loaded = llama_jax.load()
    >>> request = llama_jax.text_request(
    ...     loaded.tokenizer,
    ...     "Once upon a time",
    ...     max_new_tokens=3,
    ...     sampling=llama_jax.Sampling(temperature=0),
    ... )
    >>> [completion] = generate(loaded, [request])
    >>> completion.text, completion.finish_reason
    (', there was', 'length')
    """
    prompts = [
        tuple(map(int, request.prompt_ids))
        for request in requests
        for _ in range(request.num_samples)
    ]
    parts: list[list[Delta]] = [[] for _ in prompts]
    for delta in stream(loaded, requests, chunk=chunk, max_batch_bytes=max_batch_bytes):
        parts[delta.completion].append(delta)
    return [_joined(*pair) for pair in zip(prompts, parts, strict=True)]


def _joined(prompt: tuple[int, ...], deltas: Sequence[Delta]) -> Completion:
    last = deltas[-1]
    assert last.finish_reason is not None, "the last delta says why a completion ended"
    scored = last.logprobs is not None
    logprobs = tuple(p for delta in deltas for p in delta.logprobs or ())
    top = tuple(pairs for delta in deltas for pairs in delta.top_logprobs or ())
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(id for delta in deltas for id in delta.token_ids),
        finish_reason=last.finish_reason,
        prompt_ids=prompt,
        logprobs=logprobs if scored else None,
        top_logprobs=top if scored else None,
        stop_id=last.stop_id,
        stop_logprob=last.stop_logprob,
    )


@checked(PromptError)
def stream(
    loaded: Loaded,
    requests: Sequence[Request],
    *,
    chunk: int = 8,
    max_batch_bytes: int | None = None,
) -> Iterator[Delta]:
    """Complete requests, yielding the new text of every completion as it is made.

    Args:
      loaded: model, weights and tokenizer.
      requests: any number; they run in one batch after another, the longest first.
      chunk: decoding steps between two yields; changes nothing else.
      max_batch_bytes: see `generate`.

    Raises:
      PromptError, CheckpointError: see `generate`.

    >>> import llama_jax
    >>> loaded = llama_jax.load()
    >>> request = llama_jax.text_request(
    ...     loaded.tokenizer,
    ...     "Once upon a time",
    ...     max_new_tokens=3,
    ...     sampling=llama_jax.Sampling(temperature=0),
    ... )
    >>> "".join(delta.text for delta in stream(loaded, [request]))
    ', there was'
    """
    if loaded.language_model.runtime.layer_layout != "unrolled":
        raise ConfigError("runtime: generation needs layer_layout='unrolled'")
    for number, request in enumerate(requests):
        check_request(request, loaded.model.config, f"request {number + 1}")
    owners = [(request, n) for request in requests for n in range(request.num_samples)]
    groups = cut_batches(
        [request for request, _ in owners],
        loaded.language_model,
        max_bytes=max_batch_bytes,
    )
    for group in groups:
        rows = [Row(*owners[index], index, loaded) for index in group]
        yield from _stream_batch(loaded, rows, chunk)


def check_request(request: Request, config: LlamaConfig, name: str = "request") -> None:
    """Raise a `PromptError` if the model cannot run a request."""
    check_token_ids(request, config, name)
    length, vocab = len(request.prompt_ids), config.vocab_size
    if length >= config.max_seq_len:
        raise PromptError(
            f"{name}: the prompt has {length} tokens, but the context holds "
            f"{config.max_seq_len}, the answer included; shorten it"
        )
    if request.logprobs is not None and request.logprobs > vocab:
        raise PromptError(
            f"{name}: logprobs must be at most {vocab}, got {request.logprobs}"
        )


def check_token_ids(request: Request, config: LlamaConfig, name: str) -> None:
    """Raise a `PromptError` if the prompt has ids that the model lacks."""
    ids = [int(id) for id in request.prompt_ids]
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise PromptError(f"{name}: a token id is outside 0 … {config.vocab_size - 1}")


def check_logprobs(logprobs: np.ndarray, loaded: Loaded) -> None:
    """Raise a `CheckpointError` if log-probabilities of tokens are not finite.

    They are finite exactly if the logits that the tokens were drawn from are numbers,
    so this test computes nothing on the device. Only if it fails, the weights are
    searched.
    """
    if np.isfinite(logprobs).all():
        return
    dtype = loaded.model.runtime.dtype
    wider = "" if dtype == "float32" else f"use a wider dtype than {dtype} (--dtype)"
    if name := find_non_finite(loaded.params):
        raise CheckpointError(
            f"{name}: has numbers that are NaN or infinite, and so have the logits; "
            f"download or convert the model again{wider and ', or ' + wider}"
        )
    raise CheckpointError(
        "the logits are NaN or infinite, although all weights are finite; "
        + (wider or "some weights must be far too large, use another checkpoint")
    )


class Row:
    """One completion of a request: turns its tokens into deltas."""

    def __init__(
        self, request: Request, sample: int, index: int, loaded: Loaded
    ) -> None:
        self.request, self.index, self.sample = request, index, sample
        self.prompt = tuple(map(int, request.prompt_ids))
        self.finished = False
        self._left = token_limit(request, loaded.model.config)
        self._decoder = StreamDecoder(
            loaded.tokenizer, after_marker=request.after_marker
        )
        self._scanner = StopScanner(request.stop)

    def echo(self, row: int, scores: TokenLogprobs | None) -> Delta:
        """The prompt as a delta; its first token has no log-probability."""
        text = self._decoder.push(self.prompt)
        if scores is None or self.request.logprobs is None:
            return Delta(self.index, text, self.prompt, None, None, None)
        logprobs, top = self._logprobs(scores, row, len(self.prompt) - 1)
        return Delta(self.index, text, self.prompt, (0.0, *logprobs), ((), *top), None)

    def take(self, row: int, emitted: Emitted) -> Delta | None:
        """The delta of new tokens; None if there are none."""
        if self.finished:
            return None
        ids: list[int] = []
        texts: list[str] = []
        reason: FinishReason | None = None
        stop_id: int | None = None
        for token in emitted.tokens[row].tolist():
            if token < 0 or reason:
                break
            self._left -= 1
            if token in self.request.stop_ids:
                reason, stop_id = "stop", token
                break
            ids.append(token)
            texts.append(self._scanner.push(self._decoder.push([token])))
            if self._scanner.stopped:
                reason = "stop"
            elif self._left == 0:
                reason = "length"
        if reason is not None:
            self.finished = True
            texts.append(self._scanner.push(self._decoder.flush()))
            texts.append(self._scanner.flush())
        if not ids and reason is None:
            return None
        logprobs, top, stop_logprob = None, None, None
        if self.request.logprobs is not None:
            logprobs, top = self._logprobs(emitted.logprobs, row, len(ids))
            if stop_id is not None:
                stop_logprob = float(emitted.logprobs.chosen[row, len(ids)])
        text = "".join(texts)
        stop = (reason, stop_id, stop_logprob)
        return Delta(self.index, text, tuple(ids), logprobs, top, *stop)

    def _logprobs(
        self, scores: TokenLogprobs, row: int, count: int
    ) -> tuple[tuple[float, ...], tuple[TopLogprobs, ...]]:
        """The first `count` of a row's, as wide as the request wants them."""
        top = self.request.logprobs or 0
        ids = scores.top_ids[row, :count, :top].tolist()
        values = scores.top[row, :count, :top].tolist()
        pairs = (
            tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)
        )
        return tuple(scores.chosen[row, :count].tolist()), tuple(pairs)


def _stream_batch(loaded: Loaded, rows: list[Row], chunk: int) -> Iterator[Delta]:
    """Run rows in one batch."""
    model, params, tokenizer = loaded.language_model, loaded.params, loaded.tokenizer
    requests = [row.request for row in rows]
    samples = [row.sample for row in rows]
    inputs = start_inputs(requests, model.config, tokenizer, samples=samples)
    top = max(request.logprobs or 0 for request in requests)
    echoed = [request for request in requests if request.echo]
    slots = max(slots_needed(request, model.config) for request in requests)
    lanes, emitted, scores = start(
        model,
        params,
        *inputs,
        num_slots=bucket(slots, model.config.max_seq_len),
        top=top,
        score_prompt=any(request.logprobs is not None for request in echoed),
    )
    prompt_scores = to_host(scores) if echoed else None
    for number, row in enumerate(rows):
        if row.request.echo:
            yield row.echo(number, prompt_scores)
    while True:
        news = to_host(emitted)
        check_logprobs(news.logprobs.chosen[news.tokens >= 0], loaded)
        for number, row in enumerate(rows):
            if delta := row.take(number, news):
                yield delta
        if all(row.finished for row in rows):
            return
        stopped = np.ones(lanes.done.shape, bool)
        stopped[: len(rows)] = [row.finished for row in rows]
        lanes = release(lanes, jnp.asarray(stopped))
        lanes, emitted = advance(model, params, lanes, jnp.int32(chunk), top=top)
