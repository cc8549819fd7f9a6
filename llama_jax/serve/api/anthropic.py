"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's protocol, stateless."""

import secrets
from collections.abc import Sequence
from typing import Any

from llama_jax.generation.request import Request, Settings
from llama_jax.generation.scoring import Score
from llama_jax.serve.api.call import MAX_STOPS, Event, Served, take_sampling
from llama_jax.serve.api.chat import make_chat, parse_content
from llama_jax.serve.api.errors import ApiError
from llama_jax.serve.api.fields import Fields
from llama_jax.serve.jobs import Delta, Usage
from llama_jax.text.dialogs import Message

_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Messages:
    """A call of `/v1/messages`; see `Call`.

    Args:
      served: the model.
      fields: of the body, without `model`.

    Raises:
      ApiError, PromptError: a field is wrong.
    """

    def __init__(self, served: Served, fields: Fields) -> None:
        self._served, self.last_line = served, b""
        self._id = f"msg_{secrets.token_hex(12)}"
        fields.require("max_tokens")
        self.stream = fields.boolean("stream")
        self._stops = fields.strings("stop_sequences", most=MAX_STOPS)
        metadata = fields.value("metadata")
        self.client = ""
        if metadata is not None:
            inner = Fields(metadata, "metadata")
            self.client = inner.string("user_id") or ""
            inner.end()
        settings: Settings = {
            "max_new_tokens": fields.integer("max_tokens", least=1),
            "sampling": take_sampling(fields, served.tokenizer),
            "stop": self._stops,
        }
        dialog = _dialog(fields)
        fields.end()
        self.requests: Sequence[Request] = [make_chat(served, dialog, settings)]
        self.scored: Sequence[Request] = ()
        self._text, self._finish = "", "length"
        self._ids: list[int] = []

    def begin(self, scores: Sequence[Score]) -> list[Event]:
        """See `Call`: the message without content, and its only block."""
        usage = Usage(len(self.requests[0].prompt_ids))
        message = self._message([], None, None, usage)
        block = {"type": "text", "text": ""}
        return [
            _event("message_start", message=message),
            _event("content_block_start", index=0, content_block=block),
        ]

    def push(self, number: int, delta: Delta) -> list[Event]:
        """See `Call`."""
        self._text += delta.text
        self._ids += delta.ids
        self._finish = delta.finish_reason or self._finish
        if not delta.text:
            return []
        text = {"type": "text_delta", "text": delta.text}
        return [_event("content_block_delta", index=0, delta=text)]

    def end(self, usages: Sequence[Usage]) -> list[Event]:
        """See `Call`: the reason of the end, and the usage."""
        reason, sequence = self._reason(usages[0])
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [
            _event("content_block_stop", index=0),
            _event("message_delta", delta=delta, usage=_usage(usages[0])),
            _event("message_stop"),
        ]

    def whole(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """See `Call`."""
        content = [{"type": "text", "text": self._text}]
        return self._message(content, *self._reason(usages[0]), usages[0])

    def _reason(self, usage: Usage) -> tuple[str, str | None]:
        if self._finish == "length":
            return "max_tokens", None
        if usage.generated_tokens > len(self._ids):  # a stop id, which is not in `ids`
            return "end_turn", None
        rest = self._served.tokenizer.decode(self._ids)[len(self._text) :]
        matches = [stop for stop in self._stops if rest.startswith(stop)]
        return ("stop_sequence", matches[0]) if matches else ("end_turn", None)

    def _message(
        self,
        content: list[dict[str, str]],
        reason: str | None,
        sequence: str | None,
        usage: Usage,
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._served.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": _usage(usage),
        }


def count_tokens(served: Served, fields: Fields) -> dict[str, Any]:
    """Count the tokens of a dialog."""
    dialog = _dialog(fields)
    fields.end()
    return {"input_tokens": len(make_chat(served, dialog, {}).prompt_ids)}


def error_body(error: ApiError) -> dict[str, Any]:
    """The body of an error in Anthropic's shape."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _dialog(fields: Fields) -> list[Message]:
    """The messages, after the system text if there is one."""
    dialog: list[Message] = []
    system = fields.value("system")
    if system is not None:
        content = parse_content(fields, system, "system")
        dialog.append({"role": "system", "content": content})
    fields.require("messages")
    messages = fields.value("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.error("messages", "must be a list with at least one message")
    for number, item in enumerate(messages):
        inner = Fields(item, f"messages[{number}]")
        role = inner.string("role")
        if role not in ("user", "assistant"):
            raise inner.error("role", f"{role!r} is not user or assistant")
        content = parse_content(inner, inner.value("content"))
        inner.end()
        dialog.append({"role": role, "content": content})  # type: ignore[typeddict-item]
    return dialog


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_prompt_tokens,
        "cache_read_input_tokens": usage.cached_prompt_tokens,
        "output_tokens": usage.generated_tokens,
    }


def _event(kind: str, **data: Any) -> Event:
    return Event({"type": kind, **data}, kind)
