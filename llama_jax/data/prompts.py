"""Prompts: the part of each record that a model is to continue or to answer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama_jax.data.files import Corpus, Location, Raw
from llama_jax.data.records import (
    Dialog,
    OnBad,
    decode,
    parse_messages,
    recognise,
)
from llama_jax.errors import DataError
from llama_jax.text.dialogs import Message
from llama_jax.types import Path


class Prompt(NamedTuple):
    """The prompt of a record.

    Attributes:
      location: file and line (or row, item, document).
      number: of the record among all records of the files, from 0.
      content: a text to continue, or messages that end with the user's.
      answered: whether the record has an answer, which is not part of the prompt.
    """

    location: Location
    number: int
    content: str | Sequence[Message]
    answered: bool = False


def read_prompts(
    files: Sequence[Path],
    *,
    on_bad: OnBad = "refuse",
    on_problem: Callable[[DataError], None] | None = None,
) -> list[Prompt]:
    """Read the prompts of files in order.

    Records have the shapes of `read_records`, with or without an answer: a `prompt`
    (text or messages) alone, an `instruction` without `output`, and dialogs that end
    with the user's message are prompts; a last answer is left out.

    Args:
      files: .jsonl, .json, .txt, each also with .gz; .parquet.
      on_bad: whether a malformed record is dropped, or raises.
      on_problem: called with the error of each record that is dropped.

    Raises:
      DataError: a file cannot be read, or a record has no prompt; names file and line.
    """
    corpus = Corpus(files)
    prompts = []
    for number in range(len(corpus)):
        try:
            prompts.append(parse_prompt(corpus.read(number), number))
        except DataError as error:
            if on_bad == "refuse":
                raise
            if on_problem is not None:
                on_problem(error)
    return prompts


def parse_prompt(raw: Raw, number: int = 0) -> Prompt:
    """Parse the prompt of a record, or raise a `DataError` with its location."""
    value = decode(raw)
    try:
        if not (raw.begins and raw.ends):
            raise DataError("is too long a document for a prompt; shorten it")
        content, answered = (
            (value, False) if isinstance(value, str) else _prompt_of(value)
        )
        if not content:
            raise DataError("has an empty prompt", reason="empty")
    except DataError as error:
        raise DataError(f"{raw.location}: {error}", reason=error.reason) from error
    return Prompt(raw.location, number, content, answered)


def _prompt_of(value: object) -> tuple[str | Sequence[Message], bool]:
    if not isinstance(value, dict):
        recognise(value)  # raises
    assert isinstance(value, dict)
    # A table has null where there is no value.
    value = {key: part for key, part in value.items() if part is not None}
    if not {"messages", "conversations"} & value.keys():
        answered = bool({"response", "completion", "output", "chosen"} & value.keys())
        prompt = value.get("prompt")
        if isinstance(prompt, str):
            return prompt, answered
        if isinstance(prompt, list):
            messages, ends = _without_answer(parse_messages(prompt, "prompt"))
            return messages, ends or answered
        if "instruction" in value:
            dialog = recognise({"output": "", **value})
            assert isinstance(dialog, Dialog)
            return dialog.messages[:1], answered
    content = recognise(value)
    if isinstance(content, str):
        return content, False
    assert isinstance(content, Dialog), "a pair has a prompt"
    return _without_answer(content.messages)


def _without_answer(messages: Sequence[Message]) -> tuple[Sequence[Message], bool]:
    answered = messages[-1]["role"] == "assistant"
    question = messages[:-1] if answered else messages
    if not question or question[-1]["role"] != "user":
        raise DataError("has no user's message to answer")
    return question, answered
