"""`/infill`, as the editor plugins of llama.cpp use it."""

import secrets
from collections.abc import Sequence
from typing import Any

from llama_jax.generation.request import Request, default_sampling, infill_request
from llama_jax.generation.scoring import Score
from llama_jax.serve.api.call import MAX_STOPS, Event, Served
from llama_jax.serve.api.fields import Fields
from llama_jax.serve.jobs import Delta, Usage

_NUMBERS = ("temperature", "top_p", "min_p")
_RENAMED = {
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_HINTS = ("cache_prompt", "id_slot", "samplers", "t_max_prompt_ms", "t_max_predict_ms")
"""Fields about the speed of llama.cpp, and the order of its filters, which is fixed
here; they change nothing."""


class Infill:
    """A call of `/infill`; see `Call`.

    Args:
      served: an infilling model.
      fields: of the body, without `model`.

    Raises:
      ApiError, PromptError: a field is wrong.
    """

    def __init__(self, served: Served, fields: Fields) -> None:
        self._served, self.last_line, self.client = served, b"", ""
        given: dict[str, Any] = {name: fields.number(name) for name in _NUMBERS}
        given |= {ours: fields.number(name) for name, ours in _RENAMED.items()}
        given["top_k"] = fields.integer("top_k")
        seed = fields.integer("seed", least=-1)
        given["seed"] = secrets.randbits(32) if seed in (None, -1) else seed
        given = {name: value for name, value in given.items() if value is not None}
        count = fields.integer("n_predict", least=-1)
        if count == 0:
            raise fields.error("n_predict", "is 0; ask for at least one token")
        stop = fields.strings("stop", most=MAX_STOPS)
        self.stream = fields.boolean("stream")
        self._wanted = fields.strings("response_fields", most=64)
        if self.stream and self._wanted:
            raise fields.error("response_fields", "has no effect with stream: true")
        if fields.integer("n_indent"):
            raise fields.error("n_indent", "is not supported; leave it out")
        for name in _HINTS:
            fields.value(name)
        prefix = fields.string("input_prefix") or ""
        suffix = fields.string("input_suffix") or ""
        prefix = _extra(fields) + prefix + (fields.string("prompt") or "")
        fields.end()
        request = infill_request(
            served.tokenizer,
            prefix,
            suffix,
            max_new_tokens=None if count == -1 else count,
            sampling=default_sampling(served.tokenizer, **given),
            stop=stop,
        )
        self.requests: Sequence[Request] = [request]
        self.scored: Sequence[Request] = ()
        self._text, self._finish = "", "length"

    def begin(self, scores: Sequence[Score]) -> list[Event]:
        """See `Call`."""
        return []

    def push(self, number: int, delta: Delta) -> list[Event]:
        """See `Call`."""
        self._text += delta.text
        self._finish = delta.finish_reason or self._finish
        if not self.stream or not delta.text:
            return []
        return [Event({"content": delta.text, "stop": False, "index": 0})]

    def end(self, usages: Sequence[Usage]) -> list[Event]:
        """See `Call`: the numbers of tokens."""
        return [Event({**self._numbers(usages[0]), "content": ""})]

    def whole(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """See `Call`."""
        body = {**self._numbers(usages[0]), "content": self._text}
        if self._wanted:
            return {name: body[name] for name in self._wanted if name in body}
        return body

    def _numbers(self, usage: Usage) -> dict[str, Any]:
        return {
            "index": 0,
            "model": self._served.name,
            "stop": True,
            "stop_type": "limit" if self._finish == "length" else "eos",
            "truncated": False,
            "tokens_cached": usage.cached_prompt_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_predicted": usage.generated_tokens,
        }


def _extra(fields: Fields) -> str:
    """Texts of other files, which come before the prefix."""
    value = fields.value("input_extra")
    if value is None:
        return ""
    if not isinstance(value, list):
        raise fields.error("input_extra", "must be a list of objects with text")
    texts = []
    for number, item in enumerate(value):
        inner = Fields(item, f"input_extra[{number}]")
        inner.string("filename")
        texts.append(f"{inner.string('text') or ''}\n")
        inner.end()
    return "".join(texts)
