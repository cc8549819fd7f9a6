"""What every protocol makes of a request's body: a call, fed with deltas."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from llama_jax.generation.request import Request, Settings, default_sampling
from llama_jax.generation.sampling import Sampling
from llama_jax.generation.scoring import Score
from llama_jax.serve.api.fields import Fields
from llama_jax.serve.jobs import Delta, Usage
from llama_jax.text.tokenizer import Tokenizer

MAX_STOPS = 16
MAX_SAMPLES = 128
DONE = b"data: [DONE]\n\n"
"""Ends a stream of OpenAI's protocol."""
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class Served(NamedTuple):
    """A model that is served, as protocols see it.

    Attributes:
      name: by which requests choose it.
      tokenizer: of the model.
      context: most tokens of a prompt and its answer.
      fingerprint: of weights, configuration and software.
      format: name of the prompt format of its chats; None is the checkpoint's.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    fingerprint: str
    format: str | None = None


class Event(NamedTuple):
    """A server-sent event: its data, and a name in protocols that have names."""

    data: Any
    name: str | None = None


@runtime_checkable
class Call(Protocol):
    """A parsed request; deltas go in, JSON comes out.

    Attributes:
      requests: for the engine.
      scored: prompts whose log-probabilities go into `begin`.
      client: name of the user, for fairness.
      stream: whether the client wants events.
      last_line: what follows the last event.
    """

    requests: Sequence[Request]
    scored: Sequence[Request]
    client: str
    stream: bool
    last_line: bytes

    def begin(self, scores: Sequence[Score]) -> list[Event]:
        """Return the events before the first delta."""

    def push(self, number: int, delta: Delta) -> list[Event]:
        """Return the events of a delta of request `number`."""

    def end(self, usages: Sequence[Usage]) -> list[Event]:
        """Return the events after the last delta."""

    def whole(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """Return the answer of a call without events, after the last delta."""


@dataclasses.dataclass
class Head:
    """The fields that all chunks of an answer share."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, served: Served) -> "Head":
        """Make the head of an answer."""
        id = f"{prefix}-{secrets.token_hex(12)}"
        return cls(id, int(time.time()), served.name, served.fingerprint)


def take_sampling(fields: Fields, tokenizer: Tokenizer) -> Sampling:
    """Take the fields that say how tokens are drawn.

    Raises:
      ApiError, PromptError: a value is of a wrong type or out of range.
    """
    given: dict[str, Any] = {name: fields.number(name) for name in _NUMBERS}
    given |= {name: fields.integer(name) for name in ("top_k", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("seed", secrets.randbits(32))
    bias = fields.value("logit_bias")
    if bias is not None:
        given["logit_bias"] = _token_biases(fields, bias)
    return default_sampling(tokenizer, **given)


def take_settings(
    fields: Fields, served: Served, max_new_tokens: int | None, logprobs: int | None
) -> Settings:
    """Take the fields of a request's settings that both of OpenAI's protocols have.

    Raises:
      ApiError, PromptError: a value is of a wrong type or out of range.
    """
    return {
        "max_new_tokens": max_new_tokens,
        "sampling": take_sampling(fields, served.tokenizer),
        "stop": fields.strings("stop", most=MAX_STOPS),
        "num_samples": take_samples(fields),
        "logprobs": logprobs,
    }


def _token_biases(fields: Fields, bias: Any) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise fields.error("logit_bias", "must be an object of token ids and numbers")
    inner, biases = Fields(bias, "logit_bias"), {}
    for name in bias:
        if not name.isdecimal() or len(name) > 9:
            raise fields.error("logit_bias", f"{name!r} is not a token id")
        value = inner.number(name)
        biases[int(name)] = 0.0 if value is None else value
    return biases


def take_samples(fields: Fields) -> int:
    """Take `n`."""
    count = fields.integer("n", least=1) or 1
    if count > MAX_SAMPLES:
        raise fields.error("n", f"is {count}; at most {MAX_SAMPLES}")
    return count


def take_stream(fields: Fields) -> tuple[bool, bool]:
    """Take `stream` and `stream_options`: whether events, whether usage in them."""
    stream = fields.boolean("stream")
    options = fields.value("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise fields.error("stream_options", "needs stream: true")
    inner = Fields(options, "stream_options")
    include_usage = inner.boolean("include_usage")
    inner.end(unsupported={"include_obfuscation": False})
    return stream, include_usage


def openai_usage(usages: Sequence[Usage]) -> dict[str, Any]:
    """The `usage` of an answer in OpenAI's shape."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.generated_tokens for usage in usages)
    cached = sum(usage.cached_prompt_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
