"""Records to examples: the ids of a format, and which of them are learnt."""

import dataclasses
import itertools
from typing import Literal, NamedTuple

import numpy as np

from llama_jax.data.batch import Example
from llama_jax.data.infilling import RATE, cut, encode_cut
from llama_jax.data.records import Dialog, Pair, Record
from llama_jax.errors import DataError, PromptError, TokenizerError
from llama_jax.text.dialogs import Message, Span
from llama_jax.text.prompt_formats import FORMATS, get_format
from llama_jax.text.tokenizer import Tokenizer

TEXT_FORMATS = ("text", "infilling")
DATA_FORMATS = (*TEXT_FORMATS, *FORMATS)
"""Names of all formats: of text as it is, and of dialogs."""

OnLong = Literal["drop", "truncate", "refuse"]


class Encoded(NamedTuple):
    """The examples of one record, and whether its end was cut off."""

    examples: list[Example]
    truncated: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """What a format makes of a record.

    A dialog is written by its prompt format, the tokens in front of an answer being
    those of inference, and the answers are learnt with the tokens that end them. What
    the user said last without an answer is left out. An Alpaca record is a dialog of
    one turn; a format that has no place of its own for its input appends it to the
    instruction as a paragraph.

    As `text`, a document is learnt whole, from begin to end of sequence, in windows of
    `length` if it is longer: every token but the first is a target exactly once. Of a
    prompt with a response the response is learnt. `infilling` is text with Code
    Llama's transform for the documents that fit into one window.

    Attributes:
      tokenizer: the model's.
      format: one of `DATA_FORMATS`.
      length: T, slots of a row.
      on_long: what becomes of a record with answers that does not fit.
      seed: of the infilling transform.
      infilling_rate: how many documents are transformed.

    Raises:
      PromptError: there is no such format.
      DataError: the tokenizer cannot write the format.
    """

    tokenizer: Tokenizer
    format: str
    length: int
    on_long: OnLong = "drop"
    seed: int = 0
    infilling_rate: float = RATE

    def __post_init__(self) -> None:
        """Check what would otherwise be wrong with every record."""
        if self.length < 1:
            raise DataError(f"data: the sequence length is {self.length}, not positive")
        if self.format not in TEXT_FORMATS:
            get_format(self.format)
        if self.format == "infilling" and self.tokenizer.infilling is None:
            raise DataError(
                "data: the tokenizer has no infilling pieces; use that of Code Llama "
                "7B or 13B, or --format text"
            )

    def encode(self, record: Record, *key: int) -> Encoded:
        """The examples of a record.

        Args:
          record: of any shape that the format can write.
          key: of this visit, for what is random.

        Raises:
          DataError: with the place of the record, which cannot be written, is too long
            for `on_long`, or has nothing to learn.
        """
        try:
            return self._encode(record, key)
        except DataError as error:
            message = f"{record.place}: {error}"
            raise DataError(message, reason=error.reason) from error
        except (PromptError, TokenizerError) as error:
            raise DataError(f"{record.place}: {error}", reason="unsuitable") from error

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
        if isinstance(content, Pair) and self.format == "text":
            response = self.tokenizer.encode_infilling(content.response)
            return self._answers([
                Span(self.tokenizer.encode(content.prompt, bos=True, eos=False), False),
                Span([*response, self.tokenizer.eos_id], True),
            ])  # fmt: skip
        if self.format in TEXT_FORMATS:
            raise DataError(
                f"is not plain text, which {self.format} wants; use the format of a "
                "chat or instruction model",
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
            return self.tokenizer.encode(text, bos=True, eos=record.ends)
        ids = self.tokenizer.encode_infilling(text)
        return [*ids, self.tokenizer.eos_id] if record.ends else ids

    def _windows(self, ids: list[int]) -> list[Example]:
        """Examples of at most T slots; the last id of one is the first of the next."""
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
        else:
            messages = list(content.messages)
        format = get_format(self.format)
        if "input" not in format.keys:
            messages = [_with_input(message) for message in messages]
        format.check(messages)
        if messages[-1]["role"] == "user":
            messages.pop()
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError("has no answer to learn from", reason="empty")
        return format.spans(self.tokenizer, messages)

    def _answers(self, spans: list[Span]) -> Encoded:
        lengths = [len(span.ids) for span in spans]
        ids = np.fromiter(itertools.chain(*(span.ids for span in spans)), np.int32)
        mask = np.repeat([span.is_answer for span in spans], lengths)
        most = self.length + 1
        truncated = len(ids) > most
        if truncated and self.on_long != "truncate":
            raise DataError(
                f"has {len(ids)} tokens, more than the {most} of a sequence; truncate "
                "or drop such records, or raise the sequence length",
                reason="long",
            )
        if not mask[1:most].any():
            what = "within a sequence's length" if truncated else "in it"
            raise DataError(f"has no answer to learn from {what}", reason="empty")
        return Encoded([Example(ids[:most], mask[:most])], truncated)


def _with_input(message: Message) -> Message:
    """An instruction and its input as one text."""
    if "input" not in message:
        return message
    written = Message(
        role=message["role"], content=f"{message['content']}\n\n{message['input']}"
    )
    if "destination" in message:
        written["destination"] = message["destination"]
    return written
