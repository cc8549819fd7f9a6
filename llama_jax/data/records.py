"""Records: the shapes in which people keep text, answers and dialogs, made one."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from llama_jax.data.files import Corpus, Place, Raw
from llama_jax.errors import DataError
from llama_jax.text.dialogs import Message
from llama_jax.types import Path

OnBad = Literal["drop", "refuse"]


class Pair(NamedTuple):
    """A prompt and what is to follow it, both as they are."""

    prompt: str
    response: str


class Dialog(NamedTuple):
    """Messages for a prompt format to write; it also checks their order."""

    messages: Sequence[Message]


Content = str | Pair | Dialog


class Record(NamedTuple):
    """One record and where it was found.

    Attributes:
      place: file and line (or row, item, document).
      content: of one of three kinds.
      begins, ends: of a text, whether its first and last characters are here; other
        pieces of it are records of their own.
    """

    place: Place
    content: Content
    begins: bool = True
    ends: bool = True


def read_records(
    files: Sequence[Path],
    *,
    on_bad: OnBad = "refuse",
    on_problem: Callable[[DataError], None] | None = None,
    prefer_text: bool = False,
    separator: str = "<|endoftext|>",
    folder: Path | None = None,
) -> Iterator[Record]:
    """The records of some files in their order, one at a time.

    A file of JSON lines, a JSON list, or Parquet holds records of these shapes:
    `{"text"}`; `{"prompt", "response"}` or `completion`; Alpaca's `{"instruction",
    "input", "output"}`; dialogs as OpenAI's `{"messages": [{"role", "content"}]}` or
    ShareGPT's `{"conversations": [{"from", "value"}]}`. Other keys are not looked at.

    Args:
      files: .jsonl, .json, .txt, each also with .gz; .parquet.
      on_bad: whether a malformed record is dropped, or ends the reading.
      on_problem: called with each that is dropped.
      prefer_text: of a record with `text` and other keys, take the text.
      separator: between the documents of a .txt.
      folder: where compressed files and Parquet are expanded, a temporary one if None.

    Raises:
      DataError: a file cannot be read, or a record is malformed, by file and line.
    """
    corpus = Corpus(files, separator=separator, folder=folder)
    for number in range(len(corpus)):
        try:
            yield parse(corpus.read(number), prefer_text=prefer_text)
        except DataError as error:
            if on_bad == "refuse":
                raise
            if on_problem is not None:
                on_problem(error)


def parse(raw: Raw, *, prefer_text: bool = False) -> Record:
    """What the bytes of a record say, or a `DataError` with its place."""
    try:
        text = raw.data.decode()
        if raw.place.unit == "document":
            return Record(raw.place, text, raw.begins, raw.ends)
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{raw.place}: is not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{raw.place}: is not JSON ({error})") from error
    try:
        return Record(raw.place, recognise(value, prefer_text=prefer_text))
    except DataError as error:
        raise DataError(f"{raw.place}: {error}") from error


def recognise(value: object, *, prefer_text: bool = False) -> Content:
    """The content of a record of any known shape.

    Raises:
      DataError: it has none of them, or something else where its text should be.
    """
    if not isinstance(value, dict):
        raise DataError(f"is {_kind(value)}, not an object with keys")
    # What a table has no value for is null there.
    value = {key: part for key, part in value.items() if part is not None}
    if prefer_text and "text" in value:
        return _text(value, "text")
    for key, read in (("messages", _openai), ("conversations", _sharegpt)):
        if key in value:
            return Dialog(_messages(value[key], key, read))
    if "instruction" in value and "output" in value:
        return Dialog(_alpaca(value))
    for key in ("response", "completion"):
        if "prompt" in value and key in value:
            return Pair(_text(value, "prompt"), _text(value, key))
    if "text" in value:
        return _text(value, "text")
    found = ", ".join(f"{key!r:.40}" for key in sorted(value)[:8]) or "no keys"
    raise DataError(
        f"has {found}, but neither text, prompt and response, instruction and output, "
        "messages nor conversations"
    )


def _alpaca(value: Mapping[str, Any]) -> list[Message]:
    asked = Message(role="user", content=_text(value, "instruction"))
    if value.get("input", ""):
        asked["input"] = _text(value, "input")
    return [asked, Message(role="assistant", content=_text(value, "output"))]


def _messages(
    value: object, key: str, read: Callable[[Mapping[str, Any]], Message]
) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"has {_kind(value)} as its {key!r}, not a list of messages")
    messages = []
    for number, message in enumerate(value, start=1):
        where = f"message {number} of {len(value)}"
        if not isinstance(message, dict):
            raise DataError(f"{where} is {_kind(message)}, not an object")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise DataError(f"{where} has {name!r}, which no format here can write")
        if message.get("weight", 1) not in (None, 1):
            raise DataError(f"{where} has a weight of its own, which is not supported")
        try:
            messages.append(read(message))
        except DataError as error:
            raise DataError(f"{where} {error}") from error
    return messages


def _openai(message: Mapping[str, Any]) -> Message:
    roles = {role: role for role in ("system", "user", "assistant")}
    content = message.get("content")
    if isinstance(content, list):  # a list of parts, of which only text is text
        parts = [part if isinstance(part, dict) else {} for part in content]
        if any(part.get("type") != "text" for part in parts):
            raise DataError("has parts that are not text")
        content = "".join(_text(part, "text") for part in parts)
        message = {**message, "content": content}
    written = Message(
        role=_role(message, "role", roles), content=_text(message, "content")
    )
    if message.get("destination") is not None:
        written["destination"] = _text(message, "destination")
    if message.get("input"):
        written["input"] = _text(message, "input")
    return written


_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant",
    "chatgpt": "assistant", "assistant": "assistant",
}  # fmt: skip


def _sharegpt(message: Mapping[str, Any]) -> Message:
    role = _role(message, "from", _SHAREGPT_ROLES)
    return Message(role=role, content=_text(message, "value"))


def _role(
    message: Mapping[str, Any], key: str, roles: Mapping[str, str]
) -> Literal["system", "user", "assistant"]:
    name = message.get(key)
    if not isinstance(name, str) or name not in roles:
        raise DataError(
            f"has {name!r:.40} as its {key!r}, not one of {', '.join(roles)}"
        )
    return cast(Literal["system", "user", "assistant"], roles[name])


def _text(value: Mapping[str, Any], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise DataError(f"has {_kind(text)} as its {key!r}, not a text")
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"{value!r:.40}")
