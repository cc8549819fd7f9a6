"""Records: text, answers and dialogs of every common shape, in one form."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, cast

from llama_jax.data.files import Corpus, Location, Raw
from llama_jax.errors import DataError
from llama_jax.text.dialogs import Message
from llama_jax.types import JsonObject, Path

OnBad = Literal["drop", "refuse"]


class Pair(NamedTuple):
    """A prompt and its response, without a format."""

    prompt: str
    response: str


class Dialog(NamedTuple):
    """Messages for a prompt format, which also checks their order.

    Attributes:
      messages: in order.
      learnt: whether each message is learnt; empty if all answers are. Only an
        assistant's message can be.
    """

    messages: Sequence[Message]
    learnt: Sequence[bool] = ()


Content = str | Pair | Dialog


class Record(NamedTuple):
    """A record and its origin.

    Attributes:
      location: file and line (or row, item, document).
      content: of one of three kinds.
      begins, ends: of a text, whether it has the document's first and last characters;
        other pieces of a document are records of their own.
    """

    location: Location
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
    """Read the records of files in order.

    A file of JSON lines, a JSON list, or Parquet has records of these shapes:
    `{"text"}`; `{"prompt", "response"}` or `completion`, as texts or lists of messages;
    Alpaca's `{"instruction", "input", "output"}`; dialogs as `messages` or
    `conversations`, of OpenAI's messages `{"role", "content"}` or ShareGPT's `{"from",
    "value"}`. A message may have a `weight` of 0 or 1, or `train` of false or true:
    whether it is learnt. Others are ignored.

    Args:
      files: .jsonl, .json, .txt, each also with .gz; .parquet.
      on_bad: whether a malformed record is dropped, or raises.
      on_problem: called with the error of each record that is dropped.
      prefer_text: read the text of a record with `text` and other keys.
      separator: between the documents of a .txt.
      folder: where compressed files and Parquet are expanded; None is a temporary one.

    Raises:
      DataError: a file cannot be read, or a record is malformed; names file and line.
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
    """Parse the bytes of a record, or raise a `DataError` with its location."""
    value = decode(raw)
    if raw.location.unit == "document":
        assert isinstance(value, str)
        return Record(raw.location, value, raw.begins, raw.ends)
    try:
        return Record(raw.location, recognise(value, prefer_text=prefer_text))
    except DataError as error:
        raise DataError(f"{raw.location}: {error}") from error


def decode(raw: Raw) -> object:
    """Decode the bytes of a record: a text if it is a document, else its JSON value.

    Raises:
      DataError: it is not UTF-8, or not JSON; the message has its location.
    """
    try:
        text = raw.data.decode()
        return text if raw.location.unit == "document" else json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{raw.location}: is not UTF-8 at byte {error.start}; save the file as "
            "UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{raw.location}: is not JSON ({error}); each record must be on one line"
        ) from error


def recognise(value: object, *, prefer_text: bool = False) -> Content:
    """Read the content of a record of any known shape.

    Raises:
      DataError: it has another shape, or no text where text should be.
    """
    if not isinstance(value, dict):
        raise DataError(f"is {_kind(value)}, not an object with keys")
    # A table has null where there is no value.
    value = {key: part for key, part in value.items() if part is not None}
    if prefer_text and "text" in value:
        return _text(value, "text")
    for key in ("messages", "conversations"):
        if key in value:
            return _dialog(value[key], key)
    if "instruction" in value and "output" in value:
        return Dialog(_alpaca(value))
    for key in ("response", "completion"):
        if "prompt" in value and key in value:
            return _pair(value["prompt"], value[key], key)
    if "text" in value:
        return _text(value, "text")
    if "chosen" in value and "rejected" in value:
        raise DataError(
            "is a preference between answers ('chosen' and 'rejected'), not an answer; "
            "rename 'chosen' to 'completion' (or 'messages') to learn it alone"
        )
    keys = ", ".join(f"{key!r:.40}" for key in sorted(value)[:8]) or "no keys"
    raise DataError(
        f"has {keys}, but neither text, prompt and response, instruction and output, "
        "messages nor conversations"
    )


def _alpaca(value: JsonObject) -> list[Message]:
    instruction = Message(role="user", content=_text(value, "instruction"))
    if value.get("input", ""):
        instruction["input"] = _text(value, "input")
    return [instruction, Message(role="assistant", content=_text(value, "output"))]


def _pair(prompt: object, response: object, key: str) -> Pair | Dialog:
    """A prompt and its response: texts, or lists of messages as TRL writes them."""
    if isinstance(prompt, str) and isinstance(response, str):
        return Pair(prompt, response)
    messages: list[object] = []
    for name, part, role in (("prompt", prompt, "user"), (key, response, "assistant")):
        if isinstance(part, list):
            messages += part
        elif isinstance(part, str):
            messages.append({"role": role, "content": part})
        else:
            raise DataError(f"has {_kind(part)} as its {name!r}, not a text")
    dialog = _dialog(messages, f"prompt and {key}")
    size = len(prompt) if isinstance(prompt, list) else 1
    if all(message["role"] != "assistant" for message in dialog.messages[:size]):
        return dialog
    answers = [message["role"] == "assistant" for message in dialog.messages]
    learnt = dialog.learnt or answers  # answers in the prompt are its context
    return dialog._replace(learnt=[False] * size + list(learnt[size:]))


def parse_messages(value: object, key: str) -> list[Message]:
    """Read a list of messages of OpenAI's or ShareGPT's form.

    Args:
      value: from JSON.
      key: of the list in its record, for errors.

    Raises:
      DataError: it is no such list.
    """
    return list(_dialog(value, key).messages)


def _dialog(value: object, key: str) -> Dialog:
    if not isinstance(value, list):
        raise DataError(f"has {_kind(value)} as its {key!r}, not a list of messages")
    if not value:
        raise DataError(f"has no message in its {key!r}", reason="empty")
    messages, flags = [], []
    for number, message in enumerate(value, start=1):
        where = f"message {number} of {len(value)}"
        if not isinstance(message, dict):
            raise DataError(f"{where} is {_kind(message)}, not an object")
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise DataError(f"{where} has {name!r}, which no format here can write")
        try:
            messages.append(_message(message))
            flags.append(_learnt(message, messages[-1]["role"]))
        except DataError as error:
            raise DataError(f"{where} {error}") from error
    if all(flag is None for flag in flags):
        return Dialog(messages)
    answers = [message["role"] == "assistant" for message in messages]
    return Dialog(
        messages,
        [
            answer if flag is None else flag
            for answer, flag in zip(answers, flags, strict=True)
        ],
    )


def _learnt(message: JsonObject, role: str) -> bool | None:
    """What a message says on whether it is learnt; None if it says nothing."""
    flags = set()
    for name, values in (("weight", (0, 1)), ("train", (False, True))):
        value = message.get(name)
        if value is None:
            continue
        if isinstance(value, bool) != (name == "train") or value not in values:
            allowed = " or ".join(json.dumps(one) for one in values)
            raise DataError(f"has {value!r:.40} as its {name!r}, not {allowed}")
        flags.add(bool(value))
    if len(flags) > 1:
        raise DataError("has a 'weight' and a 'train' that contradict each other")
    learnt = flags.pop() if flags else None
    if learnt and role != "assistant":
        raise DataError(
            f"is the {role}'s and marked as learnt, but only the assistant's can be"
        )
    return learnt


def _message(message: JsonObject) -> Message:
    """Read a message of either form; one that is of both must say the same twice."""
    if "from" not in message:
        return _openai(message)
    sharegpt = _sharegpt(message)
    if "role" in message and _openai(message) != sharegpt:
        raise DataError("has 'role' and 'from' that contradict each other")
    return sharegpt


def _openai(message: JsonObject) -> Message:
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


def _sharegpt(message: JsonObject) -> Message:
    role = _role(message, "from", _SHAREGPT_ROLES)
    return Message(role=role, content=_text(message, "value"))


def _role(
    message: JsonObject, key: str, roles: Mapping[str, str]
) -> Literal["system", "user", "assistant"]:
    name = message.get(key)
    if not isinstance(name, str) or name not in roles:
        raise DataError(
            f"has {name!r:.40} as its {key!r}, not one of {', '.join(roles)}"
        )
    return cast(Literal["system", "user", "assistant"], roles[name])


def _text(value: JsonObject, key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str):
        raise DataError(f"has {_kind(text)} as its {key!r}, not a text")
    return text


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"{value!r:.40}")
