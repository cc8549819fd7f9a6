"""Dialogs, and the interface of prompt formats that encode them.

A dialog is a list of messages: an optional `system` message, then `user` and
`assistant` alternately. The formats are in `llama_jax.text.prompt_formats`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, NotRequired, TypedDict, get_args

from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.text.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a dialog.

    The optional keys belong to single formats: `destination` is the recipient (Code
    Llama 70B), `input` the data for an instruction (Alpaca).
    """

    role: Role
    content: str
    destination: NotRequired[str]
    input: NotRequired[str]


Dialog = Sequence[Message]


class Span(NamedTuple):
    """Consecutive tokens, either of an answer or of its context."""

    ids: list[int]
    is_answer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """The prompt format of a family of models.

    Attributes:
      name: its key in `FORMATS`.
      write: yields the spans of a valid dialog.
      tags: special text that messages must not contain.
      stop_tokens: pieces or added tokens that end an answer, as the tokenizer's
        `end_ids` do. Those that the tokenizer lacks are ignored.
      stop_strings: text that ends an answer, for models that write their end of turn
        as text. Good answers must never contain it.
      system: whether a system message is allowed.
      turns: whether more than one user message is allowed.
      alternate: whether user and assistant must alternate.
      keys: optional message keys of this format.
      write_prompt: writes a prompt; None joins the spans of `write`.
      settings: what the ids depend on besides the name, for JSON.
    """

    name: str
    write: Callable[[Tokenizer, Dialog], Iterator[Span]]
    tags: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    system: bool = True
    turns: bool = True
    alternate: bool = True
    keys: tuple[str, ...] = ()
    write_prompt: Callable[[Tokenizer, Dialog], list[int]] | None = None
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def encode(
        self, tokenizer: Tokenizer, dialog: Dialog, *, allow_tags: bool = False
    ) -> list[int]:
        """Encode a dialog as a prompt that ends where the answer begins.

        Args:
          tokenizer: of the model.
          dialog: ends with a user message.
          allow_tags: allow special tags in messages; only for trusted text.

        Returns:
          Prompt ids, with the begin of sequence.

        Raises:
          UnsafePromptError: a message contains one of `tags`.
          PromptError: the format cannot express this dialog.
        """
        if dialog and dialog[-1].get("role") == "assistant":
            raise self._error(
                dialog, len(dialog) - 1, "is the last; it must be the user's"
            )
        self.check(dialog, allow_tags=allow_tags)
        if self.write_prompt is not None:
            return self.write_prompt(tokenizer, dialog)
        return [id for span in self.write(tokenizer, dialog) for id in span.ids]

    def spans(
        self, tokenizer: Tokenizer, dialog: Dialog, *, allow_tags: bool = False
    ) -> list[Span]:
        """Encode a dialog for training: its ids in spans, answers apart from context.

        An answer includes the token that ends it. If the dialog ends with an answer, so
        do the spans, and the ids before that answer are those that `encode` returns for
        the messages before it.

        Args and Raises: as in `encode`.
        """
        self.check(dialog, allow_tags=allow_tags)
        return [span for span in self.write(tokenizer, dialog) if span.ids]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer."""
        ids = [tokenizer.piece_id(token) for token in self.stop_tokens]
        ends = (*(id for id in ids if id is not None), *tokenizer.end_ids)
        return tuple(dict.fromkeys(ends))

    def check(self, dialog: Dialog, *, allow_tags: bool = False) -> None:
        """Raise the errors that `spans` would raise, without encoding."""
        first = 1 if dialog and dialog[0].get("role") == "system" else 0
        if len(dialog) == first:
            raise PromptError(f"{self.name}: the dialog has no user message; add one")
        if first and not self.system:
            raise self._error(dialog, 0, "is not supported by this format; remove it")
        for i, message in enumerate(dialog):
            role = "user" if (i - first) % 2 == 0 else "assistant"
            if self.alternate and i >= first and message.get("role") != role:
                raise self._error(dialog, i, f"must be the {role}'s")
            if message.get("role") not in get_args(Role):
                roles = " or ".join(f"{role}'s" for role in get_args(Role))
                raise self._error(dialog, i, f"must be the {roles}")
            if i >= first + 2 and not self.turns:
                raise self._error(dialog, i, "is too many; this format has one turn")
            for key, text in {"content": None, **message}.items():
                if key not in ("role", "content", *self.keys):
                    problem = f"has the key {key!r}, which this format does not have"
                    raise self._error(dialog, i, problem)
                if not isinstance(text, str):
                    raise self._error(dialog, i, f"has no text as its {key!r}")
        for i, message in enumerate(dialog if not allow_tags else []):
            text = "\n".join(map(str, message.values()))
            if tags := [tag for tag in self.tags if tag in text]:
                problem = f"contains the special tag {tags[0]}; remove it"
                raise UnsafePromptError(str(self._error(dialog, i, problem)))

    def _error(self, dialog: Dialog, i: int, problem: str) -> PromptError:
        return message_error(self.name, dialog, i, problem)


def message_error(format: str, dialog: Dialog, i: int, problem: str) -> PromptError:
    """An error that names a format and message i of a dialog."""
    message = f"message {i + 1} of {len(dialog)} (role {dialog[i].get('role')!r})"
    return PromptError(f"{format}: {message} {problem}")


def pairs(dialog: Dialog) -> tuple[str | None, list[tuple[Message, str | None]]]:
    """The system text, and each user message with its answer (None if unanswered)."""
    system = dialog[0]["content"] if dialog[0]["role"] == "system" else None
    turns = dialog[1:] if system is not None else dialog
    answers: list[str | None] = [message["content"] for message in turns[1::2]]
    if len(turns) % 2:
        answers.append(None)
    return system, list(zip(turns[::2], answers, strict=True))
