"""Dialogs, and what a prompt format makes of them: checks, spans of ids, a prompt.

A dialog is a list of messages: an optional `system` message, then `user` and
`assistant` in turn. The formats themselves are in `llama_jax.text.prompt_formats`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, NotRequired, TypedDict

from llama_jax.errors import PromptError, UnsafePromptError
from llama_jax.text.tokenizer import Tokenizer


class Message(TypedDict):
    """One turn of a dialog; a format refuses the optional keys that it does not know.

    `destination` is whom the message is for (Code Llama 70B); `input` is what an
    instruction is to be applied to (Alpaca).
    """

    role: Literal["system", "user", "assistant"]
    content: str
    destination: NotRequired[str]
    input: NotRequired[str]


Dialog = Sequence[Message]


class Span(NamedTuple):
    """Consecutive tokens that the assistant either wrote or was given."""

    ids: list[int]
    is_answer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """How one family of models wants a dialog written.

    Attributes:
      name: its key in `FORMATS`.
      write: the spans of a dialog that has been checked.
      tags: text that only the format itself may write.
      stop_tokens: pieces or added tokens that end an answer, as far as the tokenizer
        has them; where there are none, the end of sequence does.
      stop_strings: text that ends an answer, for models that spell their end of turn.
        Only what a good answer never contains, and nothing for models that reliably
        end with a token.
      system: whether there may be a system message.
      turns: whether there may be more than one user message.
      keys: optional message keys that it understands.
    """

    name: str
    write: Callable[[Tokenizer, Dialog], Iterator[Span]]
    tags: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()
    system: bool = True
    turns: bool = True
    keys: tuple[str, ...] = ()

    def encode(
        self, tokenizer: Tokenizer, dialog: Dialog, *, allow_tags: bool = False
    ) -> list[int]:
        """Prompt ids of `dialog`, up to where the assistant's answer begins.

        Args:
          tokenizer: the model's.
          dialog: ends with a user message.
          allow_tags: for text that no user wrote: take the special tags in it for
            what they look like.

        Raises:
          UnsafePromptError: a message contains one of `tags`.
          PromptError: the format cannot express these messages in this order.
        """
        if dialog and dialog[-1].get("role") == "assistant":
            raise self._refusal(
                dialog, len(dialog) - 1, "is the last; it must be the user's"
            )
        spans = self.spans(tokenizer, dialog, allow_tags=allow_tags)
        return [id for span in spans for id in span.ids]

    def spans(
        self, tokenizer: Tokenizer, dialog: Dialog, *, allow_tags: bool = False
    ) -> list[Span]:
        """The ids of `dialog`, cut where answers begin and end.

        An answer includes the token that ends it. A dialog that ends with an answer is
        a training example: in front of its last answer stand the very ids that
        `encode` gives for the messages in front of it.
        """
        self.check(dialog, allow_tags=allow_tags)
        return [span for span in self.write(tokenizer, dialog) if span.ids]

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids that end an answer."""
        ids = [tokenizer.piece_id(token) for token in self.stop_tokens]
        return tuple(id for id in ids if id is not None) or (tokenizer.eos_id,)

    def check(self, dialog: Dialog, *, allow_tags: bool = False) -> None:
        """Raise what `spans` would raise for `dialog`."""
        first = 1 if dialog and dialog[0].get("role") == "system" else 0
        if len(dialog) == first:
            raise PromptError(f"{self.name}: the dialog has no user message")
        if first and not self.system:
            raise self._refusal(dialog, 0, "has no place in this format")
        for i, message in enumerate(dialog):
            wanted = "user" if (i - first) % 2 == 0 else "assistant"
            if i >= first and message.get("role") != wanted:
                raise self._refusal(dialog, i, f"must be the {wanted}'s")
            if i >= first + 2 and not self.turns:
                raise self._refusal(dialog, i, "is too many; this format has one turn")
            for key, text in {"content": None, **message}.items():
                if key not in ("role", "content", *self.keys):
                    what = f"has {key!r}, which this format does not know"
                    raise self._refusal(dialog, i, what)
                if not isinstance(text, str):
                    raise self._refusal(dialog, i, f"has no text as its {key!r}")
        for i, message in enumerate(dialog if not allow_tags else []):
            text = "\n".join(map(str, message.values()))
            if tags := [tag for tag in self.tags if tag in text]:
                what = f"contains the special tag {tags[0]}"
                raise UnsafePromptError(str(self._refusal(dialog, i, what)))

    def _refusal(self, dialog: Dialog, i: int, what: str) -> PromptError:
        who = f"message {i + 1} of {len(dialog)} (role {dialog[i].get('role')!r})"
        return PromptError(f"{self.name}: {who} {what}")


def pairs(dialog: Dialog) -> tuple[str | None, list[tuple[Message, str | None]]]:
    """The system text and each user message with its answer, None if still open."""
    system = dialog[0]["content"] if dialog[0]["role"] == "system" else None
    turns = dialog[1:] if system is not None else dialog
    answers: list[str | None] = [message["content"] for message in turns[1::2]]
    if len(turns) % 2:
        answers.append(None)
    return system, list(zip(turns[::2], answers, strict=True))
