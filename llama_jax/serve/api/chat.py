"""`/v1/chat/completions`: dialogs answered."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_jax.errors import PromptError
from llama_jax.generation.request import Request, Settings, chat_request
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
from llama_jax.serve.api.errors import ApiError
from llama_jax.serve.api.fields import Fields
from llama_jax.serve.api.logprobs import chat_logprobs
from llama_jax.serve.jobs import Delta, TokenLogprob, Usage
from llama_jax.text.dialogs import Message

_UNSUPPORTED: dict[str, Any] = {
    "audio": None,
    "function_call": "none",
    "functions": [],
    "metadata": {},
    "modalities": ["text"],
    "parallel_tool_calls": None,
    "prediction": None,
    "prompt_cache_key": None,
    "reasoning_effort": None,
    "response_format": {"type": "text"},
    "safety_identifier": None,
    "service_tier": "auto",
    "store": False,
    "tool_choice": "none",
    "tools": [],
    "verbosity": None,
    "web_search_options": None,
}
"""Fields of the protocol that are refused, and the values that do not use them."""
_EMPTY: dict[str, Any] = {"annotations": [], "tool_calls": []}
_ROLES = {"system": "system", "developer": "system", "user": "user"}
_ROLES |= {"assistant": "assistant"}


@dataclasses.dataclass
class _Choice:
    """A choice so far."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)


class Chat:
    """A call of `/v1/chat/completions`; see `Call`.

    Args:
      served: the model.
      fields: of the body, without `model`.

    Raises:
      ApiError, PromptError: a field is wrong.
    """

    def __init__(self, served: Served, fields: Fields) -> None:
        self._served = served
        self.last_line = DONE
        self._head = Head.new("chatcmpl", served)
        top = fields.integer("top_logprobs", least=0)
        self._logprobs = fields.boolean("logprobs")
        if top is not None and not self._logprobs:
            raise fields.error("top_logprobs", "needs logprobs: true")
        old = fields.integer("max_tokens", least=1)
        limit = fields.integer("max_completion_tokens", least=1)
        if None not in (old, limit):
            raise fields.error("max_tokens", "is the old max_completion_tokens")
        self.client = fields.string("user") or ""
        self.stream, self._include_usage = take_stream(fields)
        logprobs = (top or 0) if self._logprobs else None
        settings = take_settings(
            fields, served, limit if old is None else old, logprobs
        )
        self._samples = settings["num_samples"]
        fields.require("messages")
        dialog = parse_messages(fields.value("messages"))
        fields.end(unsupported=_UNSUPPORTED)
        self.requests: Sequence[Request] = [make_chat(served, dialog, settings)]
        self.scored: Sequence[Request] = ()
        self._choices = [_Choice() for _ in range(self._samples)]

    def begin(self, scores: Sequence[Score]) -> list[Event]:
        """See `Call`: the role."""
        delta = {"role": "assistant", "content": ""}
        choices = [self._chunk(index, delta) for index in range(self._samples)]
        return [Event(self._body([choice], chunk=True)) for choice in choices]

    def push(self, number: int, delta: Delta) -> list[Event]:
        """See `Call`."""
        choice = self._choices[delta.index]
        choice.text += delta.text
        choice.finish_reason = delta.finish_reason
        if not self.stream:
            choice.logprobs += delta.logprobs
            return []
        chunks = []
        if delta.text or delta.logprobs:
            content = {"content": delta.text}
            chunks.append(self._chunk(delta.index, content, delta.logprobs))
        if delta.finish_reason is not None:
            last = {
                **self._chunk(delta.index, {}),
                "finish_reason": delta.finish_reason,
            }
            chunks.append(last)
        return [Event(self._body([chunk], chunk=True)) for chunk in chunks]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
    ) -> dict[str, Any]:
        described = (
            chat_logprobs(self._served.tokenizer, logprobs) if logprobs else None
        )
        fields = {"index": index, "delta": delta, "logprobs": described}
        return {**fields, "finish_reason": None}

    def _body(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        head = {**vars(self._head), "object": kind, "choices": choices}
        return {**head, "usage": None} if self._include_usage else head

    def end(self, usages: Sequence[Usage]) -> list[Event]:
        """See `Call`: the usage, if it is asked for."""
        if not self._include_usage:
            return []
        return [Event({**self._body([], chunk=True), "usage": openai_usage(usages)})]

    def whole(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """See `Call`."""
        choices = []
        for index, choice in enumerate(self._choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            logprobs = None
            if self._logprobs:
                logprobs = chat_logprobs(self._served.tokenizer, choice.logprobs)
            fields = {"index": index, "message": message, "logprobs": logprobs}
            choices.append({**fields, "finish_reason": choice.finish_reason})
        body = self._body(choices, chunk=False)
        return {**body, "usage": openai_usage(usages)}


def make_chat(served: Served, dialog: list[Message], settings: Settings) -> Request:
    """Make the request of a dialog.

    Raises:
      ApiError: the model's format refuses a message, which it names.
    """
    try:
        return chat_request(served.tokenizer, dialog, format=served.format, **settings)
    except PromptError as error:
        unsafe = type(error) is not PromptError
        code = "unsafe_prompt" if unsafe else "invalid_messages"
        raise ApiError(str(error), code=code, param="messages") from error


def parse_messages(value: Any) -> list[Message]:
    """Parse messages in OpenAI's shape.

    Raises:
      ApiError: names the message that is wrong.
    """
    if not isinstance(value, list) or not value:
        raise ApiError(
            "messages: must be a list with at least one message", param="messages"
        )
    dialog: list[Message] = []
    for number, item in enumerate(value):
        fields = Fields(item, f"messages[{number}]")
        role = fields.string("role")
        if role not in _ROLES:
            roles = ", ".join(_ROLES)
            raise fields.error("role", f"{role!r} is not supported; use {roles}")
        content = parse_content(fields, fields.value("content"))
        fields.end(unsupported=_EMPTY)
        dialog.append({"role": _ROLES[role], "content": content})  # type: ignore[typeddict-item]
    return dialog


def parse_content(fields: Fields, value: Any, name: str = "content") -> str:
    """Parse a text, or a list of parts that are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise fields.error(name, "must be a text or a list of texts")
    texts = []
    for number, item in enumerate(value):
        part = Fields(item, f"{name}[{number}]")
        kind = part.string("type")
        if kind != "text":
            raise fields.error(name, f"part {number} is {kind!r}; only text is read")
        part.require("text")
        texts.append(part.string("text") or "")
        part.end()
    return "".join(texts)
