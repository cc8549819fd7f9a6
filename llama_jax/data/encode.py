"""Encoders of records: token ids in a format, and which of them are learnt."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from llama_jax.data.batch import Example
from llama_jax.data.files import Corpus
from llama_jax.data.infilling import RATE, cut, encode_cut
from llama_jax.data.records import Dialog, Pair, Record, parse
from llama_jax.errors import DataError, PromptError, TokenizerError
from llama_jax.text.chat_template import DEFAULT, TEMPLATE, is_template
from llama_jax.text.dialogs import Message, PromptFormat, Span
from llama_jax.text.prompt_formats import FORMATS, get_format, unknown_format
from llama_jax.text.tokenizer import Tokenizer

TEXT_FORMATS = ("text", "infilling")
AUTO = "auto"
DATA_FORMATS = (AUTO, *TEXT_FORMATS, *FORMATS, TEMPLATE)
"""Names of all formats: one that fits the data, of plain text, and of dialogs."""


def check_format(name: str) -> None:
    """Raise a `PromptError` if there is no format of this name."""
    if name not in DATA_FORMATS and not is_template(name):
        raise unknown_format(name, DATA_FORMATS)


OnLong = Literal["drop", "truncate", "refuse"]


class Encoded(NamedTuple):
    """The examples of one record, and whether its end was cut off."""

    examples: list[Example]
    truncated: bool = False


EncodeFunction = Callable[[Record], Sequence[Example]]
"""Makes the examples of a record."""


@runtime_checkable
class RecordEncoder(Protocol):
    """Makes examples from records: `Encoder`, `FunctionEncoder`, or one of your own."""

    @property
    def length(self) -> int:
        """T, the most slots of an example."""

    @property
    def on_long(self) -> OnLong:
        """Whether a `DataError` with reason "long" drops its record or ends reading."""

    @property
    def prefer_text(self) -> bool:
        """Whether the text of a record with `text` and other keys is read."""

    @property
    def can_split(self) -> bool:
        """Whether an example may be cut anywhere, to fill a row."""

    def encode(self, record: Record, *key: int) -> Encoded:
        """Make the examples of a record; raise a `DataError` if it has none.

        Args:
          record: any record.
          key: numbers of epoch and record, for what is random.
        """

    def settings(self) -> dict[str, object]:
        """What the examples depend on, for JSON; a resumed run must have the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionEncoder:
    """An encoder that calls a function.

    Attributes:
      function: makes the examples of a record, each of up to T slots.
      length: T, slots per row.
      on_long: see `RecordEncoder`, as is `prefer_text`.
    """

    function: EncodeFunction
    length: int
    on_long: OnLong = "drop"
    prefer_text: bool = False
    can_split: bool = False

    def encode(self, record: Record, *key: int) -> Encoded:
        """Make the examples of a record.

        Raises:
          DataError: the function raised one, or made no example or too long ones.
        """
        try:
            examples = list(self.function(record))
            _check_examples(examples, self.length)
        except DataError as error:
            raise error_at(record, error) from error
        return Encoded(examples)

    def settings(self) -> dict[str, object]:
        """The function's name, and the sequence length."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return {"encoder": name, "sequence length": self.length}


def _check_examples(examples: Sequence[Example], length: int) -> None:
    if not any(example.mask[1:].any() for example in examples):
        raise DataError("has nothing to learn", reason="empty")
    if (size := max(example.size for example in examples)) > length:
        raise DataError(
            f"has {size + 1} tokens, more than the {length + 1} of a sequence; drop "
            "such records, or raise the sequence length",
            reason="long",
        )


def error_at(record: Record, error: DataError) -> DataError:
    """The error, with the location of the record in front."""
    return DataError(f"{record.location}: {error}", reason=error.reason)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes records in a format.

    A dialog is written by its prompt format, with the same tokens before an answer as
    in inference. Answers are learnt with the tokens that end them, unless they are
    empty or their message says otherwise. A last user message without an answer is left
    out. An Alpaca record is a dialog of one turn; a format without a place for its
    input appends it to the instruction as a paragraph.

    In the format `text`, a document is learnt whole, from the begin of sequence (if the
    model's prompts have one) to its end, in windows of `length` if it is longer: every
    token but the first is a target once. Of a prompt with a response, the response is
    learnt. `infilling` is text with Code Llama's transform of the documents that fit
    into one window.

    Attributes:
      tokenizer: of the model.
      format: one of `DATA_FORMATS` but "auto", or a named template as in `get_format`.
      length: T, slots per row.
      on_long: what to do with a record with answers that does not fit.
      seed: of the infilling transform.
      infilling_rate: fraction of documents that are transformed.
      now: the time that a chat template sees.

    Raises:
      PromptError: there is no such format, or its template is not valid.
      DataError: the tokenizer cannot write the format.
    """

    tokenizer: Tokenizer
    format: str
    length: int
    on_long: OnLong = "drop"
    seed: int = 0
    infilling_rate: float = RATE
    now: datetime.datetime | None = None

    def __post_init__(self) -> None:
        """Check what would otherwise fail for every record."""
        if self.length < 1:
            raise DataError(
                f"data: sequence length must be positive, got {self.length}"
            )
        if self.format not in TEXT_FORMATS:
            _ = self._style
        if self.format == "infilling" and self.tokenizer.infilling is None:
            raise DataError(
                "data: the tokenizer has no infilling pieces; use that of Code Llama "
                "7B or 13B, or --format text"
            )

    @functools.cached_property
    def _style(self) -> PromptFormat:
        return get_format(self.format, self.tokenizer, now=self.now)

    @property
    def prefer_text(self) -> bool:
        """Whether the text of a record with `text` and other keys is read."""
        return self.format in TEXT_FORMATS

    @property
    def can_split(self) -> bool:
        """Whether an example may be cut anywhere: only text."""
        return self.format == "text"

    def settings(self) -> dict[str, object]:
        """What the examples depend on, for JSON."""
        rules = self.tokenizer.settings.to_dict()
        for name in ("chat_templates", "sampling"):  # the format names its template
            rules.pop(name, None)
        contents = self.tokenizer.contents
        if rules:
            contents += json.dumps(rules, sort_keys=True).encode()
        return {
            "tokenizer": hashlib.sha256(contents).hexdigest()[:16],
            "format": self.format,
            "sequence length": self.length,
            "on_long": self.on_long,
            "infilling rate": self.infilling_rate,
            **({} if self.format in TEXT_FORMATS else self._style.settings),
        }

    def encode(self, record: Record, *key: int) -> Encoded:
        """Make the examples of a record.

        Args:
          record: of any shape that the format can write.
          key: numbers of epoch and record, for what is random.

        Raises:
          DataError: the record cannot be written, is too long for `on_long`, or has
            nothing to learn; the message has its location.
        """
        try:
            return self._encode(record, key)
        except DataError as error:
            raise error_at(record, error) from error
        except (PromptError, TokenizerError) as error:
            raise DataError(
                f"{record.location}: {error}", reason="unsuitable"
            ) from error

    def _encode(self, record: Record, key: tuple[int, ...]) -> Encoded:
        content = record.content
        if isinstance(content, str):
            if self.format not in TEXT_FORMATS:
                raise DataError(
                    f"is plain text, which has no place in {self.format}; use --format "
                    "text",
                    reason="unsuitable",
                )
            return Encoded(self._windows(self._document(record, content, key)))
        if isinstance(content, Pair) and not content.response.strip():
            raise DataError("has no answer to learn from", reason="empty")
        if isinstance(content, Pair) and self.format == "text":
            response = self.tokenizer.encode_infilling(content.response)
            prompt = self._begin(content.prompt, ends=False)
            ends = Span([*response, *self._end], True)
            return self._answers([Span(prompt, False), ends])
        if self.format in TEXT_FORMATS:
            raise DataError(
                f"is an instruction or a dialog, not plain {self.format}; give "
                "--format alpaca for instructions, or the format of a chat model",
                reason="unsuitable",
            )
        return self._answers(self._spans(content))

    def _document(self, record: Record, text: str, key: tuple[int, ...]) -> list[int]:
        if not text:
            raise DataError("is an empty text", reason="empty")
        if record.begins and record.ends and self.format == "infilling":
            parts = cut(text, self.seed, *key, rate=self.infilling_rate)
            if parts is not None:
                ids = encode_cut(self.tokenizer, parts)
                if len(ids) <= self.length + 1:
                    return ids
        if record.begins:
            return self._begin(text, ends=record.ends)
        ids = self.tokenizer.encode_infilling(text)
        return [*ids, *self._end] if record.ends else ids

    def _begin(self, text: str, *, ends: bool) -> list[int]:
        """Encode the beginning of a text, with begin of sequence as in inference."""
        bos = self.tokenizer.settings.add_bos
        return self.tokenizer.encode(text, bos=bos, eos=ends)

    @property
    def _end(self) -> list[int]:
        return self.tokenizer.encode("", bos=False, eos=True)

    def _windows(self, ids: list[int]) -> list[Example]:
        """Examples of up to T slots; the last id of one is the first of the next."""
        array = np.asarray(ids, np.int32)
        starts = range(0, len(ids) - 1, self.length)
        windows = [array[start : start + self.length + 1] for start in starts]
        return [Example(window, np.ones(len(window), bool)) for window in windows]

    def _spans(self, content: Pair | Dialog) -> list[Span]:
        if isinstance(content, Pair):
            messages = [
                Message(role="user", content=content.prompt),
                Message(role="assistant", content=content.response),
            ]
            learnt: Sequence[bool] = ()
        else:
            messages, learnt = list(content.messages), content.learnt
        if "input" not in self._style.keys:
            messages = [_with_input(message) for message in messages]
        self._style.check(messages)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        answers = [
            message["role"] == "assistant" and bool(message["content"].strip())
            for message in messages
        ]
        if not any(answers):
            raise DataError("has no answer to learn from", reason="empty")
        learnt = [
            answer and flag
            for answer, flag in zip(answers, learnt or answers, strict=False)
        ]
        spans = self._style.spans(self.tokenizer, messages)
        return _keep_learnt(spans, messages, learnt)

    def _answers(self, spans: list[Span]) -> Encoded:
        lengths = [len(span.ids) for span in spans]
        ids = np.fromiter(itertools.chain(*(span.ids for span in spans)), np.int32)
        mask = np.repeat([span.is_answer for span in spans], lengths)
        limit = self.length + 1
        truncated = len(ids) > limit
        if truncated and self.on_long != "truncate":
            raise DataError(
                f"has {len(ids)} tokens, more than the {limit} of a sequence; truncate "
                "or drop such records, or raise the sequence length",
                reason="long",
            )
        if not mask[1:limit].any():
            what = "within a sequence's length" if truncated else "in it"
            raise DataError(f"has no answer to learn from {what}", reason="empty")
        return Encoded([Example(ids[:limit], mask[:limit])], truncated)


def choose_format(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Choose the format for data: the chat template for dialogs, else text.

    Args:
      corpus: its first valid record decides.
      tokenizer: without a chat template, the format is always text.
    """
    if DEFAULT in tokenizer.settings.chat_templates:
        for number in range(len(corpus)):
            with contextlib.suppress(DataError):
                record = parse(corpus.read(number), prefer_text=True)
                return TEMPLATE if isinstance(record.content, Dialog) else "text"
    return "text"


def _keep_learnt(
    spans: Sequence[Span], messages: Sequence[Message], learnt: Sequence[bool]
) -> list[Span]:
    """The spans, of which only the learnt messages are answers."""
    flags = [
        flag
        for message, flag in zip(messages, learnt, strict=False)
        if message["role"] == "assistant"
    ]
    if all(flags):
        return list(spans)
    # The spans of an answer are consecutive, and a prompt is between two answers.
    groups = [
        (is_answer, list(group))
        for is_answer, group in itertools.groupby(spans, lambda span: span.is_answer)
    ]
    if sum(is_answer for is_answer, _ in groups) != len(flags):
        raise DataError(
            "says which of its messages are learnt, but the template does not write "
            "each answer apart from the others",
            reason="unsuitable",
        )
    answers, masked = iter(flags), list[Span]()
    for is_answer, group in groups:
        keep = is_answer and next(answers)
        masked += (span._replace(is_answer=keep) for span in group)
    return masked


def _with_input(message: Message) -> Message:
    """An instruction and its input as one text."""
    if "input" not in message:
        return message
    combined = Message(
        role=message["role"], content=f"{message['content']}\n\n{message['input']}"
    )
    if "destination" in message:
        combined["destination"] = message["destination"]
    return combined
