"""The host side of generation: token ids in, completions out.

`stream` yields what is new after every few decoding steps; `generate` collects it.
Over several processes, each gives the same prompts and gets the same completions.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.distributed import to_host
from llama_jax.errors import ConfigError, PromptError
from llama_jax.generation import decode as decoding
from llama_jax.generation.sampling import Sampling, TokenLogprobs, sampling_rows
from llama_jax.generation.stop_strings import StopScanner
from llama_jax.text.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "unsafe"]
TopLogprobs = tuple[tuple[int, float], ...]


class Options(TypedDict, total=False):
    """What every way of generating takes.

    Keys:
      max_new_tokens: the most tokens of a completion; by default what fits the context.
      sampling: a `Sampling`, or one for each prompt.
      num_samples: completions per prompt.
      stop: strings that end a completion; they are not part of it.
      stop_ids: tokens that do; by default what the prompt format or tokenizer says.
      logprobs: also give log-probabilities, and those of this many likeliest tokens.
      echo: put the prompt in front of the completion.
    """

    max_new_tokens: int | None
    sampling: Sampling | Sequence[Sampling]
    num_samples: int
    stop: Sequence[str]
    stop_ids: Sequence[int]
    logprobs: int | None
    echo: bool


class Delta(NamedTuple):
    """What is new in one completion.

    `completion` counts them, prompt by prompt; `finish_reason` is set in the last.
    """

    completion: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[TopLogprobs, ...] | None
    finish_reason: FinishReason | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished completion.

    Attributes:
      text: without what ended it; with the prompt in front if `echo` was asked for.
      token_ids: likewise; a token that completed a stop string is the last of them.
      finish_reason: `"stop"` (stop id or string), `"length"` (the limit), or `"unsafe"`
        (a dialog with special tags, which was not run).
      prompt_ids: the prompt as the model saw it.
      logprobs: of each of `token_ids`, under the model's own distribution (no
        temperature); 0 for the very first token. None if not asked for.
      top_logprobs: the likeliest (id, log-probability) pairs in each place.
      full_text: for infilling: prefix, completion and suffix.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    full_text: str | None = None


def stream(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  (it is frozen)
    num_samples: int = 1,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    logprobs: int | None = None,
    echo: bool = False,
    after_marker: bool = False,
    chunk: int = 8,
) -> Iterator[Delta]:
    """Complete prompts, yielding every completion's new text as it is made.

    Args:
      loaded: model, weights and tokenizer.
      prompts: token ids, at least one in each.
      max_new_tokens: and the following: see `Options`.
      sampling: likewise.
      num_samples: likewise.
      stop: likewise.
      stop_ids: likewise.
      logprobs: likewise.
      echo: likewise.
      after_marker: decode as the continuation of a text (infilling), not as its start.
      chunk: decoding steps between two looks at the text; changes nothing else.

    Raises:
      PromptError: an empty or too long prompt, an id that the model lacks, a setting
        out of range; before anything is computed.
    """
    model, params, tokenizer = loaded.language_model, loaded.params, loaded.tokenizer
    config = model.config
    if model.runtime.layer_layout != "unrolled":
        raise ConfigError("runtime: generation needs layer_layout='unrolled'")
    if (max_new_tokens is not None and max_new_tokens < 1) or num_samples < 1:
        raise PromptError("max_new_tokens and num_samples must be at least 1")
    if logprobs is not None and not 0 <= logprobs <= config.vocab_size:
        raise PromptError(
            f"logprobs is {logprobs}; it must be between 0 and {config.vocab_size}"
        )
    if not prompts:
        return
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    if len(settings) != len(prompts):
        raise PromptError(f"{len(settings)} sampling settings, {len(prompts)} prompts")
    if stop_ids is None:
        stop_ids = (tokenizer.eos_id,)
    rows: list[_Row] = []
    for number, prompt in enumerate(prompts):
        check_prompt(loaded, prompt, f"prompt {number + 1}")
        room = config.max_seq_len - len(prompt)
        limit = min(room, max_new_tokens or room)
        for _ in range(num_samples):
            decoder = StreamDecoder(tokenizer, after_marker=after_marker)
            rows.append(
                _Row(
                    len(rows), prompt, limit, decoder, StopScanner(stop), set(stop_ids)
                )
            )

    # Rows that only fill the batch's bucket have no tokens to sample.
    batch = decoding.bucket(len(rows), 1 << 30, smallest=1)
    fill = batch - len(rows)
    width = decoding.bucket(max(len(row.prompt) for row in rows), config.max_seq_len)
    slots = max(len(row.prompt) + row.limit for row in rows)
    tokens = np.zeros((batch, width), np.int32)
    for row in rows:
        tokens[row.index, : len(row.prompt)] = row.prompt
    per_row = [setting for setting in settings for _ in range(num_samples)]
    arrays = sampling_rows(
        [*per_row, *[Sampling()] * fill],
        config.vocab_size,
        samples=[*list(range(num_samples)) * len(prompts), *[0] * fill],
        banned=tokenizer.unnamed_ids(config.vocab_size),
    )
    ends = np.full(decoding.bucket(len(stop_ids), 1 << 30, smallest=8), -1, np.int32)
    ends[: len(stop_ids)] = stop_ids
    top = logprobs or 0
    score_prompt = echo and logprobs is not None
    lanes, written, scores = decoding.start(
        model,
        params,
        jnp.asarray(tokens),
        jnp.asarray([len(row.prompt) for row in rows] + [1] * fill, jnp.int32),
        arrays,
        jnp.asarray([row.limit for row in rows] + [0] * fill, jnp.int32),
        jnp.asarray(ends),
        num_slots=max(decoding.bucket(slots, config.max_seq_len), width),
        top=top,
        score_prompt=score_prompt,
    )
    if echo:
        prompt_scores = to_host(scores)
        for row in rows:
            yield row.echo(prompt_scores)
    while True:
        news = to_host(written)
        for row in rows:
            if delta := row.take(news.tokens, news.logprobs, logprobs is not None):
                yield delta
        if all(row.finished for row in rows):
            return
        stopped = [row.finished for row in rows] + [True] * fill
        lanes = lanes._replace(done=lanes.done | jnp.asarray(stopped))
        lanes, written = decoding.advance(
            model, params, lanes, arrays, jnp.asarray(ends), jnp.int32(chunk), top=top
        )


class _Row:
    """One completion on its way from tokens to text."""

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        limit: int,
        decoder: StreamDecoder,
        scanner: StopScanner,
        stop_ids: set[int],
    ) -> None:
        self.index, self.prompt, self.limit = index, tuple(prompt), limit
        self.finished = False
        self._decoder, self._scanner, self._stop_ids = decoder, scanner, stop_ids
        self._left = limit

    def echo(self, scores: TokenLogprobs | None) -> Delta:
        """The prompt as a delta; its first token has no probability to speak of."""
        text = self._decoder.push(self.prompt)
        if scores is None:
            return Delta(self.index, text, self.prompt, None, None, None)
        logprobs, top = _row_logprobs(scores, self.index, len(self.prompt) - 1)
        return Delta(self.index, text, self.prompt, (0.0, *logprobs), ((), *top), None)

    def take(
        self, tokens: np.ndarray, scores: TokenLogprobs, with_scores: bool
    ) -> Delta | None:
        """What the device's new tokens add, or None if nothing can be shown yet."""
        if self.finished:
            return None
        ids: list[int] = []
        texts: list[str] = []
        reason: FinishReason | None = None
        for token in tokens[self.index].tolist():
            if token < 0 or reason:
                break
            self._left -= 1
            if token in self._stop_ids:
                reason = "stop"
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
        logprobs, top = _row_logprobs(scores, self.index, len(ids))
        return Delta(
            self.index,
            "".join(texts),
            tuple(ids),
            logprobs if with_scores else None,
            top if with_scores else None,
            reason,
        )


def _row_logprobs(
    scores: TokenLogprobs, row: int, count: int
) -> tuple[tuple[float, ...], tuple[TopLogprobs, ...]]:
    chosen = scores.chosen[row, :count].tolist()
    ids, top = scores.top_ids[row, :count].tolist(), scores.top[row, :count].tolist()
    pairs = tuple(tuple(zip(i, t, strict=True)) for i, t in zip(ids, top, strict=True))
    return tuple(chosen), pairs


def check_prompt(loaded: Loaded, prompt: Sequence[int], name: str) -> None:
    """Raise a `PromptError` if the model cannot read these ids and answer."""
    config = loaded.model.config
    if not len(prompt):
        raise PromptError(f"{name} is empty; it needs at least one token")
    if len(prompt) >= config.max_seq_len:
        raise PromptError(
            f"{name} has {len(prompt)} tokens, but the context holds "
            f"{config.max_seq_len}, the answer included; shorten it"
        )
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise PromptError(f"{name} has a token id outside 0 … {config.vocab_size - 1}")


def generate(
    loaded: Loaded, prompts: Sequence[Sequence[int]], **options: Any
) -> list[Completion]:
    """Complete token ids; arguments and errors are those of `stream`.

    Returns:
      `num_samples` completions per prompt, prompt by prompt.
    """
    options.setdefault("chunk", decoding.MAX_STEPS)
    num_samples = options.get("num_samples", 1)
    owners = [tuple(prompt) for prompt in prompts for _ in range(num_samples)]
    parts: list[list[Delta]] = [[] for _ in owners]
    for delta in stream(loaded, prompts, **options):
        parts[delta.completion].append(delta)
    completions = []
    for prompt, deltas in zip(owners, parts, strict=True):
        scored = deltas[-1].logprobs is not None
        reason = deltas[-1].finish_reason
        assert reason is not None, "the last delta of a completion says why it ended"
        completions.append(
            Completion(
                text="".join(delta.text for delta in deltas),
                token_ids=sum((delta.token_ids for delta in deltas), ()),
                finish_reason=reason,
                prompt_ids=prompt,
                logprobs=sum((d.logprobs or () for d in deltas), ())
                if scored
                else None,
                top_logprobs=(
                    sum((d.top_logprobs or () for d in deltas), ()) if scored else None
                ),
            )
        )
    return completions
