"""`/v1/completions`: texts continued, with echo, infilling and log-probabilities."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_jax.generation.request import (
    Request,
    Settings,
    infill_request,
    text_request,
    text_stop_ids,
)
from llama_jax.generation.scoring import Score
from llama_jax.serve.api.call import (
    DONE,
    Event,
    Head,
    Served,
    openai_usage,
    take_settings,
    take_stream,
)
from llama_jax.serve.api.fields import Fields
from llama_jax.serve.api.logprobs import OffsetWriter, ScoredToken
from llama_jax.serve.jobs import Delta, Usage

MAX_PROMPTS = 256
_DEFAULT_TOKENS = 16


@dataclasses.dataclass
class _Choice:
    """A choice so far."""

    text: str = ""
    finish_reason: str | None = None
    tokens: list[ScoredToken] = dataclasses.field(default_factory=list)


class Completions:
    """A call of `/v1/completions`; see `Call`.

    Args:
      served: the model.
      fields: of the body, without `model`.

    Raises:
      ApiError, PromptError: a field is wrong.
    """

    def __init__(self, served: Served, fields: Fields) -> None:
        self._served, tokenizer = served, served.tokenizer
        self.last_line = DONE
        self._head = Head.new("cmpl", served)
        suffix = fields.string("suffix")
        self._echo = fields.boolean("echo")
        self._logprobs = fields.integer("logprobs", least=0)
        tokens = fields.integer("max_tokens", least=0 if self._echo else 1)
        self._limit = _DEFAULT_TOKENS if tokens is None else tokens
        self.client = fields.string("user") or ""
        self.stream, self._include_usage = take_stream(fields)
        limit = max(self._limit, 1)
        settings = take_settings(fields, served, limit, self._logprobs)
        self._samples = settings["num_samples"]
        if suffix is not None and self._echo:
            raise fields.error("echo", "must be false with suffix")
        if self._echo and (self._logprobs or 0) > 1:
            raise fields.error("logprobs", "is at most 1 with echo")
        fields.require("prompt")
        prompts = _prompts(fields)
        best_of = fields.integer("best_of", least=1)
        if best_of not in (None, self._samples):
            raise fields.error("best_of", "must equal n, which is what is returned")
        fields.end()
        requests = []
        for prompt in prompts:
            if suffix is not None:
                if not isinstance(prompt, str):
                    raise fields.error("prompt", "must be text with suffix")
                requests.append(infill_request(tokenizer, prompt, suffix, **settings))
                continue
            if isinstance(prompt, str):
                request = text_request(tokenizer, prompt, **settings)
            else:
                with_ends: Settings = {**settings, "stop_ids": text_stop_ids(tokenizer)}
                request = Request(prompt, **with_ends)
            # The text follows the prompt's: with the space between them.
            requests.append(dataclasses.replace(request, after_marker=True))
        self._prompts = [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            for prompt in prompts
        ]
        self.requests: Sequence[Request] = requests if self._limit else []
        self._echoed = requests if self._echo else []
        self.scored: Sequence[Request] = (
            requests if self._echo and self._logprobs is not None else []
        )
        count = len(requests) * self._samples
        self._choices = [_Choice() for _ in range(count)]
        self._offsets = [
            OffsetWriter(tokenizer, after_marker=not self._echo) for _ in range(count)
        ]

    def begin(self, scores: Sequence[Score]) -> list[Event]:
        """See `Call`: with echo, the prompts."""
        events = []
        for number, request in enumerate(self._echoed):
            tokens = _prompt_tokens(request, scores[number]) if scores else []
            finish = None if self._limit else "length"
            for sample in range(self._samples):
                index = number * self._samples + sample
                events += self._add(index, self._prompts[number], tokens, finish)
        return events

    def push(self, number: int, delta: Delta) -> list[Event]:
        """See `Call`."""
        tokens = [ScoredToken(*entry) for entry in delta.logprobs]
        index = number * self._samples + delta.index
        return self._add(index, delta.text, tokens, delta.finish_reason)

    def _add(
        self, index: int, text: str, tokens: list[ScoredToken], finish: str | None
    ) -> list[Event]:
        choice = self._choices[index]
        choice.text += text
        choice.finish_reason = finish
        if not self.stream:
            choice.tokens += tokens
            return []
        if not text and not tokens and finish is None:
            return []
        return [Event(self._body([self._choice(index, text, tokens, finish)]))]

    def _choice(
        self, index: int, text: str, tokens: list[ScoredToken], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._offsets[index].write(tokens)
        fields = {"index": index, "text": text, "logprobs": logprobs}
        return {**fields, "finish_reason": finish}

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {**vars(self._head), "object": "text_completion", "choices": choices}
        return {**head, "usage": None} if self._include_usage else head

    def end(self, usages: Sequence[Usage]) -> list[Event]:
        """See `Call`: the usage, if it is asked for."""
        if not self._include_usage:
            return []
        return [Event({**self._body([]), "usage": self._usage(usages)})]

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        echoed = [Usage(len(request.prompt_ids)) for request in self._echoed]
        return openai_usage(usages if self._limit else echoed)

    def whole(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """See `Call`."""
        choices = [
            self._choice(index, choice.text, choice.tokens, choice.finish_reason)
            for index, choice in enumerate(self._choices)
        ]
        return {**self._body(choices), "usage": self._usage(usages)}


def _prompts(fields: Fields) -> list[str | list[int]]:
    """The prompts: a text, a list of texts, ids, or a list of lists of ids."""
    value = fields.value("prompt")

    def is_ids(item: Any) -> bool:
        return isinstance(item, list) and all(type(id) is int for id in item)

    if isinstance(value, str) or (value and is_ids(value)):
        value = [value]
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(item, str) or (item and is_ids(item)) for item in value)
    ):
        raise fields.error(
            "prompt", "must be a text, a list of texts, token ids, or lists of ids"
        )
    if len(value) > MAX_PROMPTS:
        raise fields.error("prompt", f"has {len(value)} prompts; at most {MAX_PROMPTS}")
    return value


def _prompt_tokens(request: Request, score: Score) -> list[ScoredToken]:
    """The tokens of a scored prompt."""
    tokens = []
    for number, id in enumerate(request.prompt_ids):
        if number == 0:
            tokens.append(ScoredToken(int(id), None, None))
            continue
        top: list[tuple[int, float]] = []
        if request.logprobs:
            best = int(score.best_ids[number])
            likeliest = score.logprobs if score.greedy[number] else score.best_logprobs
            top = [(best, float(likeliest[number]))]
        tokens.append(ScoredToken(int(id), float(score.logprobs[number]), top))
    return tokens
