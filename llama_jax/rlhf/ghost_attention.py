"""Ghost Attention: dialogs in which an instruction given once is obeyed to the end.

Llama 2 paper (arXiv:2307.09288), section 3.3: answers are sampled with the instruction
in every user turn. For training it is in the first turn alone, and the loss of all
turns before the last is zero.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.data.line_file import LineFile
from llama_jax.errors import DataError, PromptError
from llama_jax.generation.generate import check_request, generate
from llama_jax.generation.prompt_file import prompt_seed
from llama_jax.generation.request import Request
from llama_jax.text.dialogs import Dialog, Message
from llama_jax.types import JsonObject, Path

MakeRequest = Callable[[Dialog], Request]
"""Makes the request that answers a dialog."""

Problem = Literal["cut", "empty", "long", "tags"]
"""Why a dialog is not trained on: its last answer was cut at the limit of tokens or is
empty, it does not fit the context, or an answer contains special tags of the format."""


class Item(NamedTuple):
    """A dialog, and the instruction that its answers are to obey.

    Attributes:
      number: of the item, for its seed and its line.
      dialog: ends with the user's message; answers that it has are sampled again.
      instruction: in the words of a user.
    """

    number: int
    dialog: Dialog
    instruction: str


class Answered(NamedTuple):
    """A dialog whose answers were sampled.

    Attributes:
      messages: without the instruction; up to the last answer that was sampled.
      problem: why it is not trained on; None if it is.
      num_tokens: of all answers.
    """

    messages: Sequence[Message]
    problem: Problem | None
    num_tokens: int


def instruct_every_turn(dialog: Dialog, instruction: str) -> list[Message]:
    r"""Put an instruction in front of every user message, for sampling.

    >>> instruct_every_turn([{"role": "user", "content": "Hi"}], "Be brief.")
    [{'role': 'user', 'content': 'Be brief.\n\nHi'}]
    """
    return [
        _instructed(message, instruction) if message["role"] == "user" else message
        for message in dialog
    ]


def instruct_first_turn(dialog: Dialog, instruction: str) -> list[Message]:
    """Put an instruction in front of the first user message.

    Raises:
      DataError: there is no user message.
    """
    messages = list(dialog)
    for index, message in enumerate(messages):
        if message["role"] == "user":
            messages[index] = _instructed(message, instruction)
            return messages
    raise DataError("dialog: has no user message; add one")


def ghost_attention_record(dialog: Dialog, instruction: str) -> JsonObject:
    r"""Make the training record of a dialog whose answers obey an instruction.

    The instruction is in the first user turn, and only the last answer is learnt.

    Args:
      dialog: without the instruction; ends with an answer.
      instruction: that the answers obey.

    Raises:
      DataError: the dialog does not end with an answer, or has no user message.

    >>> dialog = [
    ...     {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
    ...     {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Hm"},
    ... ]
    >>> for message in ghost_attention_record(dialog, "Be brief.")["messages"]:
    ...     print(message["content"].replace("\n\n", " | "), message.get("train"))
    Be brief. | Hi None
    Ho False
    And? None
    Hm True
    """
    if not dialog or dialog[-1]["role"] != "assistant":
        raise DataError("dialog: does not end with an answer, which would be learnt")
    last = len(dialog) - 1
    messages: list[JsonObject] = [
        {**message, "train": index == last}
        if message["role"] == "assistant"
        else {**message}
        for index, message in enumerate(instruct_first_turn(dialog, instruction))
    ]
    return {"messages": messages}


def draw_instructions(
    instructions: Sequence[str], seed: int, number: int, count: int = 1
) -> list[str]:
    """Draw different instructions for a dialog.

    Args:
      instructions: to choose from.
      seed: of the run.
      number: of the dialog.
      count: of the instructions.

    Raises:
      DataError: there are fewer instructions.
    """
    if count > len(instructions):
        raise DataError(
            f"instructions: there are {len(instructions)}, but each dialog needs "
            f"{count} different ones"
        )
    rng = np.random.default_rng((seed, number))
    return [instructions[i] for i in rng.permutation(len(instructions))[:count]]


def read_instructions(path: Path) -> list[str]:
    """Read the instructions of a text file, one on each line.

    Raises:
      DataError: the file cannot be read, or has no instruction.
    """
    try:
        text = pathlib.Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as UTF-8 text with an instruction on each line"
        ) from error
    if lines := [line.strip() for line in text.splitlines() if line.strip()]:
        return lines
    raise DataError(f"{path}: has no instruction; write one on each line")


def answer_turns(
    loaded: Loaded,
    items: Sequence[Item],
    make_request: MakeRequest,
    *,
    seed: int,
    max_batch_bytes: int | None = None,
) -> list[Answered]:
    """Sample the answers of dialogs, one turn of all of them after another.

    Every answer is sampled with the instruction in all user turns, after the answers
    that were sampled before.

    Args:
      loaded: model, weights and tokenizer.
      items: dialogs and instructions.
      make_request: makes the request that answers a dialog; its seed is replaced.
      seed: of the run; see `prompt_seed`.
      max_batch_bytes: see `generate`.

    Raises:
      PromptError: the format cannot express a dialog.
    """
    problems: list[Problem | None] = [None] * len(items)
    answered: list[list[Message]] = [[] for _ in items]
    num_tokens = [0] * len(items)
    turns = [_turns(item.dialog) for item in items]
    for item, own_turns in zip(items, turns, strict=True):
        _check_dialog(item, own_turns, make_request)
    for turn in range(max(map(len, turns), default=0)):
        active, requests = [], []
        for index, item in enumerate(items):
            if turn >= len(turns[index]) or problems[index] is not None:
                continue
            messages = [*answered[index], *turns[index][turn]]
            try:
                request = make_request(instruct_every_turn(messages, item.instruction))
            except PromptError:
                problems[index] = "tags"
                continue
            try:
                check_request(request, loaded.model.config)
            except PromptError:
                problems[index] = "long"
                continue
            answered[index] = messages
            active.append(index)
            own = prompt_seed(seed, item.number)
            sampling = dataclasses.replace(request.sampling, seed=own)
            requests.append(dataclasses.replace(request, sampling=sampling))
        completions = generate(loaded, requests, max_batch_bytes=max_batch_bytes)
        for index, completion in zip(active, completions, strict=True):
            answered[index].append(Message(role="assistant", content=completion.text))
            num_tokens[index] += len(completion.token_ids)
            if turn < len(turns[index]) - 1:
                continue
            if completion.finish_reason == "length":
                problems[index] = "cut"
            elif not completion.text.strip():
                problems[index] = "empty"
    return [Answered(*row) for row in zip(answered, problems, num_tokens, strict=True)]


def sample_dialogs(
    loaded: Loaded,
    items: Sequence[Item],
    make_request: MakeRequest,
    path: Path,
    *,
    settings: JsonObject,
    seed: int,
    on_batch: Callable[[int, int], None] | None = None,
    batch_size: int = 64,
    max_batch_bytes: int | None = None,
) -> None:
    """Sample the answers of dialogs, and append a JSON line for each to a file.

    A line has `record` (the item's number), `prompt` (with the instruction in every
    user turn), `instruction`, `messages` (without it, answered), `problem` and
    `settings`. If the file has lines, the dialogs after them are answered.

    Args:
      loaded: model, weights and tokenizer.
      items: dialogs and instructions.
      make_request: makes the request that answers a dialog; its seed is replaced.
      path: of the file.
      settings: what the lines depend on; a resumed run must have the same.
      seed: of the run; see `prompt_seed`.
      on_batch: called with the number of finished dialogs and new tokens, after each
        batch and once before the first.
      batch_size: dialogs that are answered together.
      max_batch_bytes: see `generate`.

    Raises:
      DataError: the file has lines of something else.
      PromptError: see `answer_turns`.
    """
    prompts = [instruct_every_turn(item.dialog, item.instruction) for item in items]
    numbers = [item.number for item in items]
    output = LineFile(path, list(zip(numbers, prompts, strict=True)), settings)
    if on_batch is not None:
        on_batch(output.num_records, 0)
    for first in range(output.num_records, len(items), batch_size):
        batch = items[first : first + batch_size]
        answered = answer_turns(
            loaded, batch, make_request, seed=seed, max_batch_bytes=max_batch_bytes
        )
        output.append(
            [
                {
                    "record": item.number,
                    "prompt": prompts[first + row],
                    "instruction": item.instruction,
                    "messages": answered[row].messages,
                    "problem": answered[row].problem,
                    "settings": settings,
                }
                for row, item in enumerate(batch)
            ]
        )
        if on_batch is not None:
            on_batch(output.num_records, sum(one.num_tokens for one in answered))


def to_records(
    lines: Iterable[JsonObject],
) -> tuple[list[JsonObject], dict[Problem, int]]:
    """Make the training records of the lines that `sample_dialogs` wrote.

    Returns:
      The records, and how many dialogs have none, by problem.
    """
    records = []
    problems: collections.Counter[Problem] = collections.Counter()
    for line in lines:
        if line["problem"] is not None:
            problems[line["problem"]] += 1
        else:
            records.append(
                ghost_attention_record(line["messages"], line["instruction"])
            )
    return records, dict(problems)


def _check_dialog(
    item: Item, turns: Sequence[Sequence[Message]], make_request: MakeRequest
) -> None:
    """Raise the error of what users say before anything is sampled."""
    answer = Message(role="assistant", content="-")
    messages = [message for turn in turns for message in (*turn, answer)][:-1]
    try:
        make_request(instruct_every_turn(messages, item.instruction))
    except PromptError as error:
        raise PromptError(f"dialog {item.number + 1}: {error}") from error


def _turns(dialog: Dialog) -> list[list[Message]]:
    """The messages before each answer: a user's, the first with the system message."""
    turns: list[list[Message]] = [[]]
    for message in dialog:
        if message["role"] == "assistant":
            continue
        turns[-1].append(message)
        if message["role"] == "user":
            turns.append([])
    return turns[:-1]


def _instructed(message: Message, instruction: str) -> Message:
    instructed = message.copy()
    instructed["content"] = f"{instruction}\n\n{message['content']}"
    return instructed
